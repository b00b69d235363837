"""GenerateConfig: the settings of one call of `slagen generate`, checked where it is made. No torch here."""

import dataclasses
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from slagen.attention import registry
from slagen.attention.delta.method import DELTA
from slagen.attention.policy import AttentionPolicy
from slagen.attention.schedule_file import as_text
from slagen.attention.sla.config import BLOCK_SIZES, check_choice, check_fraction
from slagen.errors import UsageError
from slagen.formats.published import Sampler
from slagen.generation import config_checks
from slagen.generation.lora import lora_options, read_scales
from slagen.io.forms import shown
from slagen.io.paths import user_path
from slagen.io.text import read_device
from slagen.settings import option
from slagen.timing import Timing
from slagen.wan.caches import read_cache
from slagen.wan.defaults import MAX_STRENGTH, MIN_STRENGTH

MIN_TOPK = 1e-9  # of the key blocks: far less than one block of any clip
# Literals made of the registry's names, for the command line; the configs ask the registry itself.
if TYPE_CHECKING:
    Attention: TypeAlias = str
    AttentionBackend: TypeAlias = str
else:
    Attention, AttentionBackend = Literal[registry.names()], Literal[registry.backend_names()]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Offload = Literal["auto", "none", "model", "group", "sequential"]
VaeTiling = Literal["auto", "on", "off"]
VaeDtype = Literal["auto", "bf16", "fp32"]
VIDEO, SAMPLING, ATTENTION, OUTPUT = "Video", "Sampling", "Attention", "Output"  # panels of the help
# Options of commands that make videos, and not of those that only measure on them.
OF_VIDEOS = (
    "num_videos",
    "save_latents",
    "report",
    "measure_dense",
    "trace",
    "timing",
    "crf",
    "no_metadata",
    "preview",
    "compile",
    "cfg_parallel",
    "cache",
    "image",
)
NOT_DENSE = (  # of another attention than dense
    "sparsity", "sla_topk", "sparsity_schedule", "block_m", "block_n", "dense_steps", "dense_layers", "min_tokens",
    "delta", "measure_dense",
)  # fmt: skip
CACHE = "~/.cache/slagen"  # of hashes and prompt embeddings
MAX_SEED = 2**63 - 1
# The sampling's numbers, each with its least value and an example.
STRENGTHS = {"guidance_scale": (0.0, 5), "flow_shift": (MIN_STRENGTH, 3), "sigma_max": (MIN_STRENGTH, 80)}


def drawn_seed(seed: int) -> int | None:
    """A seed as it is typed; -1 is None, so that one is drawn."""
    return None if seed == -1 else seed


@dataclass(frozen=True)
class GenerateConfig:
    """One call of `slagen generate`. What is None is the model's own default.

    Args:
        prompt: what the video shows.
        model: preset, folder or hub id; None is TurboWan 1.3B on CUDA and the bundled model elsewhere.
        weights: SLA weights or a whole transformer, a file or folder of any public form; None takes the model's own.
        allow_untrained: accept SLA weights that are missing or all zero: sparse attention without its linear branch.
        attention: a method's name; see `slagen methods`.
        backend: which of the method's implementations.
        attention_options: (name, value) of options that only this method has.
        dense_steps, dense_layers, min_tokens, delta: what uses dense attention in any case; see AttentionPolicy.
        sparsity: fraction of key blocks not attended exactly; None is what the weights were trained with.
        sla_topk: fraction of them that is, counted as the published code does: int(sla_topk * N) of N. At most one of
            the two; see `SLAConfig.with_topk`.
        sparsity_schedule: the sparsity of some denoising steps, or of each layer in them; see AttentionPolicy. Of a
            file that `slagen tune` wrote, the config holds the content, in that form.
        block_m, block_n: query rows and key columns of a block; None is what the weights were trained with.
        negative_prompt: what to steer away from.
        width, height: in pixels. num_frames: video frames, 4k + 1. fps: frames a second.
        steps: denoising steps. guidance_scale, flow_shift, sampler: see ModelDefaults.
        sigma_max, ode: first noise level of the rcm sampler, and its form without fresh noise.
        vae: another VAE's file or folder, in the original or in diffusers' names.
        lora: LoRA files, each "FILE" or "FILE:SCALE". lora_scale: scales in place of theirs, "0.8" or "0.8,1".
        lora_merge: merge them into the weights, or compute them beside these; None merges where that is possible.
        local_files_only: download nothing.
        seed: from 0 to 2**63 - 1; None draws one. The i-th video of a call has seed + i.
        num_videos: how many videos to make of the prompt.
        dtype: of transformer and text encoder; "auto" is bf16 on CUDA (fp16 on cards without it) and fp32 elsewhere.
        device: "auto", "cpu", "cuda" or "cuda:N".
        offload: which parts are on the GPU at a time, see generation/offload.py. vae_tiling: decode in tiles.
        vae_dtype: of the VAE; "auto" is fp32 until bf16 has been measured on cards.
        compile: the transformer's blocks, see wan/compiling.py. cache: see wan/caches.py.
        cfg_parallel: the processes that torchrun started share the two passes of guidance, see generation/sharing.py.
        timing: "layer" times attention by layer, "part" its parts too, "step" by step only, "off" not at all.
        measure_dense: so many steps are run with dense attention too, to measure the speed-up.
        trace: a file that ends in .json, for the trace of the one video.
        output: a path that ends in .mp4, .webm or .gif is the file, one that ends in .frames a folder of PNG files;
            one without a suffix or with a slash at its end is a folder for MP4 videos.
        crf: constant rate factor of an MP4 or WebM; None is the default of each.
        no_metadata: the video's file does not say how it was made.
        image: that the video begins with, for an image-to-video model.
        preview: steps from one picture of the latents to the next; None makes none.
        report: also write the report as a page. save_latents: also write the final latents, as safetensors.
        overwrite: replace files that are there.
        cache_dir: where encoded prompts are kept; None is CACHE. no_cache: keep none, and load the text encoder.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    prompt: str
    negative_prompt: str | None = option(
        None, "What the video should not show.", panel=VIDEO, short="-n", prompt_line=True
    )
    model: str | None = option(
        None, "A preset, a model folder, or a Hugging Face id. The command slagen models lists the presets. Default: "
        "turbowan2.1-t2v-1.3b-480p with a CUDA device, otherwise the bundled tiny-wan.",
        panel=VIDEO, short="-m", in_key=False,
    )  # fmt: skip
    image: str | None = option(
        None, "Image that the video begins with, for an image-to-video model.", panel=VIDEO, short="-i", metavar="FILE",
        prompt_line=True, in_key=False,
    )  # fmt: skip
    width: int | None = option(
        None, "Width x height in pixels, such as 832x480, or 480p or 720p.", panel=VIDEO, metavar="WxH", is_size=True,
        prompt_line=True,
    )  # fmt: skip
    height: int | None = option(None, "In pixels.", panel=VIDEO, hidden=True, prompt_line=True)
    num_frames: int | None = option(None, "Number of frames: a multiple of 4, plus 1.", panel=VIDEO, prompt_line=True)
    fps: int | None = option(None, "Frames per second.", panel=VIDEO, prompt_line=True)
    num_videos: int = option(
        1, "Number of videos. The seed increases by 1 for each.", panel=VIDEO, prompt_line=True, pixels=False
    )
    steps: int | None = option(None, "Denoising steps.", panel=SAMPLING, prompt_line=True)
    guidance_scale: float | None = option(
        None, "Classifier-free guidance scale; 1 turns guidance off.", panel=SAMPLING, prompt_line=True
    )
    flow_shift: float | None = option(
        None, "Timestep shift of the flow-matching schedule.", panel=SAMPLING, prompt_line=True
    )
    sampler: Sampler | None = option(
        None, "unipc, euler, dpm++ or rcm. Default: the one that the weights were made for.", panel=SAMPLING
    )
    sigma_max: float | None = option(None, "Initial noise level of the rcm sampler. Default: 80.", panel=SAMPLING)
    ode: bool = option(False, "Deterministic (ODE) sampling with the rcm sampler.", panel=SAMPLING)
    seed: int | None = option(
        None, "Random seed; the same seed gives the same video. Default: -1, a random one.", panel=SAMPLING,
        read=drawn_seed, prompt_line=True, in_key=False,
    )  # fmt: skip
    dtype: Dtype = option(
        "auto", "auto is bf16 on CUDA (fp16 on cards without bf16), and fp32 on a CPU.", panel=SAMPLING
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel=SAMPLING, read=read_device, in_key=False)
    offload: Offload = option(
        "auto", "What is on the GPU at a time: none offloads nothing, model keeps one part there, group one block, "
        "sequential one layer. auto goes by the free memory.", panel=SAMPLING, pixels=False,
    )  # fmt: skip
    cfg_parallel: bool = option(
        False, "Under torchrun, compute the two passes of guidance in two halves of the processes, at the same time.",
        panel=SAMPLING, pixels=False,
    )  # fmt: skip
    compile: bool = option(False, "Compile the transformer's blocks, in the first step of each size.", panel=SAMPLING)
    cache: str | None = option(
        None, "Skip blocks in steps that change little: first-block, mag, sea or taylorseer, with parameters behind a "
        "colon, as in first-block:threshold=0.1.", panel=SAMPLING, metavar="NAME",
    )  # fmt: skip
    attention: Attention = option(
        "sla", "Attention method. The command slagen methods describes them.", panel=ATTENTION
    )
    backend: AttentionBackend = option(
        "auto", "Implementation of the attention method. The command slagen methods lists the choices.",
        panel=ATTENTION, metavar="NAME",
    )  # fmt: skip
    sparsity: float | None = option(
        None, "Fraction of key blocks without exact attention, from 0 to below 1. Default: the value from training, "
        "or the method's own.",
        panel=ATTENTION, prompt_line=True, complement="keep",
    )  # fmt: skip
    sla_topk: float | None = option(
        None, "Fraction of key blocks with exact attention (1 - sparsity). Their number is rounded down, as in the "
        "published SLA code.",
        panel=ATTENTION, prompt_line=True,
    )  # fmt: skip
    sparsity_schedule: str | None = option(
        None, "Sparsity of single denoising steps, with steps as in --dense-steps: 0-9:0.8,10-:0.95. All other steps "
        "have --sparsity. 0-:0.8/0.9/0.95 is for each layer, or give a file of slagen tune that ends in .json.",
        panel=ATTENTION, metavar="STEPS:SPARSITY,...", prompt_line=True,
    )  # fmt: skip
    block_m: int | None = option(
        None, "Query rows per block: 16, 32, 64 or 128. Default: the value from training, or the method's default.",
        panel=ATTENTION,
    )  # fmt: skip
    block_n: int | None = option(None, "Key columns per block. Default: as for --block-m.", panel=ATTENTION)
    attention_options: tuple[tuple[str, Any], ...] = option((), panel=ATTENTION, of_methods=True)
    dense_steps: str | None = option(
        None, "Denoising steps with dense attention, such as 0-9,-1 (-1 is the last step; 10- means from step 10 on), "
        "or 20% for the first 20%.",
        panel=ATTENTION, prompt_line=True,
    )  # fmt: skip
    dense_layers: str | None = option(
        None, "Layers with dense attention, in the same form as --dense-steps.", panel=ATTENTION, prompt_line=True
    )
    min_tokens: int | None = option(
        None, "Use dense attention for clips with fewer tokens than this.", panel=ATTENTION, prompt_line=True
    )
    delta: int | None = option(None, DELTA.help, panel=ATTENTION, prompt_line=True)
    weights: str | None = option(
        None, "SLA weights, or a whole transformer in any public format. Default: the model's own.", panel=ATTENTION,
        metavar="FILE_OR_FOLDER", in_key=False,
    )  # fmt: skip
    vae: str | None = option(
        None, "VAE to use instead of the model's own, such as Wan2.1_VAE.pth.", panel=VIDEO, metavar="FILE_OR_FOLDER",
        in_key=False,
    )  # fmt: skip
    lora: tuple[str, ...] = option(
        (), "A LoRA for Wan2.1, and its scale, by default 1. May be repeated.", panel=VIDEO, metavar="FILE[:SCALE]",
        in_key=False,
    )  # fmt: skip
    lora_scale: str | None = option(
        None, "Scale of all LoRAs, or of each, such as 0.8,1, in place of the one given with --lora.", panel=VIDEO,
        metavar="SCALE,...", prompt_line=True, in_key=False,
    )  # fmt: skip
    lora_merge: bool | None = option(
        None, "Merge LoRAs into the weights, so that they cost no time per step. Default: merge, except into GGUF "
        "weights.", panel=VIDEO, in_key=False,
    )  # fmt: skip
    vae_tiling: VaeTiling = option(
        "auto", "Decode in tiles, on or off: less memory, 1.65 times the FLOPs. auto does where whole frames do not "
        "fit on the GPU.", panel=VIDEO, metavar="on|off|auto",
    )  # fmt: skip
    vae_dtype: VaeDtype = option(
        "auto", "Compute type of the VAE, bf16 or fp32. bf16 takes half the memory; auto is fp32.", panel=VIDEO,
        metavar="bf16|fp32|auto",
    )  # fmt: skip
    local_files_only: bool = option(False, "Use local files only; download nothing.", panel=VIDEO, pixels=False)
    allow_untrained: bool = option(
        False, "Run SLA even if its weights are missing or all zero.", panel=ATTENTION, in_key=False
    )
    output: str = option(
        "outputs", "A folder, or one video that ends in .mp4, .webm, .gif, or .frames (a folder of PNG frames).",
        panel=OUTPUT, short="-o", pixels=False,
    )  # fmt: skip
    crf: int | None = option(
        None, "Constant rate factor; lower is better and larger: 0 to 51 for .mp4 (default 16), to 63 for .webm (18).",
        panel=OUTPUT, pixels=False,
    )  # fmt: skip
    preview: int | None = option(
        None, "Write a small picture of the latents every N steps, to VIDEO.preview.png until the video is complete.",
        panel=OUTPUT, metavar="N", pixels=False,
    )  # fmt: skip
    no_metadata: bool = option(
        False, "Leave prompt and settings out of the video's file; its report has them.", panel=OUTPUT, pixels=False
    )
    overwrite: bool = option(False, "Replace existing files.", panel=OUTPUT, pixels=False)
    report: bool = option(False, "Also write the report as an HTML page beside the video.", panel=OUTPUT, pixels=False)
    save_latents: bool = option(False, "Also write the final latents.", panel=OUTPUT, pixels=False)
    timing: Timing = option(
        "layer", "Measure the time of attention per step, per layer, with its parts, or not at all: step, layer, part "
        "or off.", panel=OUTPUT, pixels=False,
    )  # fmt: skip
    measure_dense: int | None = option(
        None, "Run this many of the steps with dense attention too, and report the measured speed-up.", panel=OUTPUT,
        pixels=False,
    )  # fmt: skip
    trace: str | None = option(
        None, "Also write a trace of stages, steps and layers, for ui.perfetto.dev or chrome://tracing.", panel=OUTPUT,
        metavar="FILE.json", pixels=False,
    )  # fmt: skip
    cache_dir: str | None = option(
        None, f"Folder for encoded prompts, which need no text encoder the next time. Default: {CACHE}.", panel=OUTPUT,
        metavar="FOLDER", pixels=False,
    )  # fmt: skip
    no_cache: bool = option(
        False, "Keep no encoded prompts, and load the text encoder in any case.", panel=OUTPUT, pixels=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity_schedule", as_text(self.sparsity_schedule, self.attention))
        object.__setattr__(self, "lora", lora_options(self.lora))
        object.__setattr__(self, "cache", None if self.cache is None else read_cache(self.cache).text)
        _check(self)

    @property
    def policy(self) -> AttentionPolicy:
        """What uses dense attention whatever the method, the sparsity by step, and the correction."""
        own = registry.get(self.attention).dense_steps if self.dense_steps is None else self.dense_steps
        return AttentionPolicy(own, self.dense_layers, self.min_tokens, self.delta, self.sparsity_schedule)

    @property
    def live_lora(self) -> bool:
        """Whether a LoRA is computed beside the weights, as with ones that stay quantised."""
        quantised = (self.weights or "").endswith(".gguf")
        return bool(self.lora) and (quantised if self.lora_merge is None else not self.lora_merge)

    @property
    def attention_settings(self) -> dict[str, Any]:
        """What is asked for of the attention method, by option; None where nothing is."""
        own = {name: getattr(self, name) for name in ("sparsity", "sla_topk", "block_m", "block_n")}
        return {**own, **dict(self.attention_options)}

    def with_dense_attention(self) -> "GenerateConfig":
        """The same with dense attention, without the options of another method."""
        none = dict.fromkeys(NOT_DENSE)
        return dataclasses.replace(self, attention="dense", backend="auto", attention_options=(), **none)  # type: ignore[arg-type]

    @property
    def slug(self) -> str:
        """The prompt as a part of a file name."""
        plain = unicodedata.normalize("NFKD", self.prompt.lower()).encode("ascii", "ignore").decode()
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-") or "video"


def _check(config: GenerateConfig) -> None:
    """Raise UsageError if a value is out of range, or the values do not go together."""
    if config.lora_scale is not None:
        read_scales(config.lora_scale)
    config_checks.check_texts(config)
    _check_kept_blocks(config)
    config_checks.check_whole_numbers(config)
    _check_strengths(config)
    _check_seed(config)
    _check_choices(config)
    config_checks.check_together(config)


def vae_bytes(config: GenerateConfig) -> int:
    """Bytes of a number of the VAE."""
    return 2 if config.vae_dtype == "bf16" else 4


def cache_folder(config: GenerateConfig) -> Path:
    """The folder of the cache. Raises UsageError for what no path can be."""
    return user_path(config.cache_dir or CACHE)


def _check_choices(config: GenerateConfig) -> None:
    """Raise UsageError for a value that is none of its option's."""
    choices_of = {"timing": Timing, "dtype": Dtype, "sampler": Sampler, "offload": Offload, "vae_tiling": VaeTiling,
                  "vae_dtype": VaeDtype}  # fmt: skip
    for name, choices in choices_of.items():
        value = getattr(config, name)
        if value not in get_args(choices) and (name, value) != ("sampler", None):
            raise UsageError(f"{name} is {shown(value)}, but must be one of {', '.join(get_args(choices))}.")


def _check_kept_blocks(config: GenerateConfig) -> None:
    """Raise UsageError for a share of blocks, or a size of a block, that is out of range or said twice."""
    if config.sparsity is not None and config.sla_topk is not None:
        raise UsageError(
            f"--sparsity {config.sparsity} and --sla-topk {config.sla_topk} both set how many blocks are kept. "
            "Give one of them."
        )
    if config.sparsity is not None:
        check_fraction("sparsity", config.sparsity, "Try --sparsity 0.95.")
    if config.sla_topk is not None and not MIN_TOPK <= config.sla_topk <= 1:
        raise UsageError(f"sla_topk is {config.sla_topk}, but must be from {MIN_TOPK:g} to 1. Try --sla-topk 0.05.")
    for name in ("block_m", "block_n"):
        if getattr(config, name) is not None:
            check_choice(name, getattr(config, name), BLOCK_SIZES)


def _check_strengths(config: GenerateConfig) -> None:
    """Raise UsageError for a number of the sampling that is out of range."""
    for name, (least, example) in STRENGTHS.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= MAX_STRENGTH:
            raise UsageError(
                f"{name} is {shown(value)}, but must be from {least:g} to {MAX_STRENGTH:g}. "
                f"Try --{name.replace('_', '-')} {example}."
            )


def _check_seed(config: GenerateConfig) -> None:
    """Raise UsageError for a seed that torch does not take, of any of the videos."""
    if config.seed is None:
        return
    if not 0 <= config.seed <= MAX_SEED:
        raise UsageError(f"seed is {shown(config.seed)}, but must be from 0 to 2**63 - 1. Try --seed 42.")
    if config.seed > MAX_SEED - config.num_videos + 1:
        raise UsageError(
            f"seed is {config.seed} and num_videos is {config.num_videos}, but the last video's seed must be at most "
            f"2**63 - 1. Try --seed {MAX_SEED - config.num_videos + 1}."
        )
