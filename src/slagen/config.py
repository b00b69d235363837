"""Every setting with its default, checked where it is made. No torch here, so that `slagen --help` answers at once."""

import dataclasses
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from slagen.attention import registry
from slagen.attention.sla.config import (
    BLOCK_SIZES,
    Backend,
    FeatureMap,
    LinearDomain,
    SLAConfig,
    check_choice,
    check_fraction,
)
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.paths import check_folder, check_output
from slagen.io.text import check_prompt, counted, quote
from slagen.settings import option
from slagen.timing import Timing

Sampler = Literal["unipc", "euler", "dpm++", "rcm"]

# What is beyond these is a slip of the pen, and would keep a machine busy before anybody noticed.
MAX_VIDEOS = 10_000  # of one prompt
MAX_OF_A_CLIP = {"width": 16_384, "height": 16_384, "num_frames": 10_001, "fps": 240, "num_videos": MAX_VIDEOS}
MAX_STRENGTH = 10_000.0  # of guidance, flow shift and the like
MIN_STRENGTH = 0.0001  # of flow shift and the largest noise: below, schedules divide by zero
MIN_TOPK = 1e-9  # of the key blocks: far less than one block of any clip
MAX_TRAINING = {
    "steps": 10_000_000, "warmup_steps": 10_000_000, "batch_size": 65_536, "micro_batch": 65_536, "lora_rank": 4096,
    "context_parallel": 4096, "save_every": 10**9, "validate_every": 10**9, "clips_per_prompt": MAX_VIDEOS,
    "held_out": 1_000_000,
}  # fmt: skip
MAX_ELEMENTS = 2**34  # of q, k and v in a bench


def _check_count(name: str, value: object) -> None:
    most = MAX_TRAINING[name]
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise UsageError(
            f"{name} is {shown(value)}, but must be at least 1, and at most {most:,}. Try --{name.replace('_', '-')} 1."
        )


@dataclass(frozen=True)
class TrainingDefaults:
    """How a model is fine-tuned unless `slagen finetune` is told otherwise; what is here is what was published for Wan.

    Args:
        steps: of the optimiser.
        lr: learning rate. proj_multiplier: factor on it for `proj_l`.
        warmup_steps: over which it rises from 0, at most a tenth of all steps. decay: fraction of the steps, at the
            end, over which it falls to 0 again.
        batch_size: clips a step, over all processes. micro_batch: clips at a time on one of them.
        log_sigma_mean, log_sigma_std: noise levels are sigma / (1 + sigma), log sigma normal.
        caption_dropout: fraction of the clips that are trained on with the negative prompt for a caption, which is what
            the unconditional pass of guidance sees; 0 leaves that pass untrained.
    Source: TurboDiffusion's SLA training, github.com/thu-ml/TurboDiffusion, whose models sample without guidance and so
    drop no caption; that part is ours.
    """

    steps: int = 2000
    lr: float = 1e-5
    proj_multiplier: float = 1.0
    warmup_steps: int = 100
    decay: float = 0.0
    batch_size: int = 32
    micro_batch: int = 1
    log_sigma_mean: float = 1.5
    log_sigma_std: float = 1.6
    caption_dropout: float = 0.1

    @classmethod
    def from_dict(cls, fields: object) -> "TrainingDefaults":
        """Build from JSON. Raises UsageError for an unknown name or a value that is no number of its type."""
        if not isinstance(fields, dict):
            raise UsageError(f"training is {shown(fields)}. Give an object.")
        for name, value in fields.items():
            field = cls.__dataclass_fields__.get(name)
            if field is None:
                raise UsageError(f"training.{shown(name)[1:-1]} is unknown. Use {', '.join(cls.__dataclass_fields__)}.")
            whole = isinstance(field.default, int)
            least = {"log_sigma_mean": -MAX_STRENGTH, "steps": 1, "batch_size": 1, "micro_batch": 1}.get(name, 0)
            is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= MAX_TRAINING.get(name, MAX_STRENGTH):
                raise UsageError(f"training.{name} is {shown(value)}. Give a value like {field.default!r}.")
        if "caption_dropout" in fields:
            check_fraction("training.caption_dropout", fields["caption_dropout"], "Give 0.1.")
        return cls(**fields)


@dataclass(frozen=True)
class ClipSize:
    """The size of a clip: width and height in pixels, and video frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} with {counted(self.num_frames, 'frame')}"

    @classmethod
    def from_dict(cls, fields: Any) -> "ClipSize":
        """Build from JSON. Raises UsageError for anything but three positive whole numbers by name."""
        names = list(cls.__dataclass_fields__)
        good = isinstance(fields, dict) and set(fields) == set(names)
        if not good or not all(type(x) is int and 0 < x <= MAX_OF_A_CLIP[name] for name, x in fields.items()):
            raise UsageError(
                f"trained_sizes holds {str(fields):.200}. Give objects of {', '.join(names)}, each a whole number "
                "above 0."
            )
        return cls(**fields)

    def distance(self, other: "ClipSize") -> float:
        """How far two sizes are apart: 0 when equal, symmetric, and the same for twice as wide as for half."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return sum(abs(math.log(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class ModelDefaults:
    """The settings a model was made for; a `slagen.json` beside `model_index.json` names those that are not Wan2.1's.

    Args:
        width, height: in pixels.
        num_frames: video frames, 4k + 1.
        fps: frames a second.
        steps: denoising steps.
        guidance_scale: weight of the prompt; above 1 every step has a second, unconditional pass.
        flow_shift: how far the sampler's steps lean towards noise.
        sampler: "rcm" for weights distilled to a few steps, otherwise "unipc", "euler" or "dpm++".
        max_sequence_length: text tokens; shorter prompts are padded to it, and the padding is attended to.
        negative_prompt: what to steer away from.
        vocabulary: every word the model knows, where that is a closed list.
        example_prompt: a prompt that works, for messages.
        training: how it is fine-tuned.
        trained_sizes: the only sizes it makes well, where there are few; None says nothing about sizes.
    """

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float = 3.0
    sampler: Sampler = "unipc"
    max_sequence_length: int = 512
    negative_prompt: str = ""
    vocabulary: tuple[str, ...] | None = None
    example_prompt: str = "a red fox walking through fresh snow, morning light"
    training: TrainingDefaults = TrainingDefaults()
    trained_sizes: tuple[ClipSize, ...] | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelDefaults":
        """Build from JSON. Raises UsageError for an unknown name or a value of another type."""
        fields = dict(fields)
        if "training" in fields:
            fields["training"] = TrainingDefaults.from_dict(fields["training"])
        sizes = fields.get("trained_sizes")
        if sizes is not None:
            if not isinstance(sizes, list) or not sizes:
                raise UsageError(f"trained_sizes is {shown(sizes)}. Give a list of objects, or leave it out.")
            fields["trained_sizes"] = tuple(ClipSize.from_dict(size) for size in sizes)
        for name, value in fields.items():
            field = cls.__dataclass_fields__.get(name)
            if field is None:
                raise UsageError(f"{shown(name)[1:-1]} is unknown. Use {', '.join(cls.__dataclass_fields__)}.")
            if name in ("training", "trained_sizes"):
                continue
            if name == "vocabulary":
                good = value is None or (isinstance(value, list) and all(isinstance(word, str) for word in value))
            elif name == "sampler":
                good = value in get_args(Sampler)
            elif isinstance(field.default, float):
                good = isinstance(value, int | float) and not isinstance(value, bool)
                good = good and (MIN_STRENGTH if name == "flow_shift" else 0) <= value <= MAX_STRENGTH and value > 0
            elif isinstance(field.default, int):
                most = {**MAX_OF_A_CLIP, "steps": 1000, "max_sequence_length": 8192}[name]
                good = type(value) is int and 0 < value <= most
            else:
                good = isinstance(value, str)
            if not good:
                raise UsageError(f"{name} is {shown(value)}. Give a value like {field.default!r}.")
        vocabulary = fields.get("vocabulary")
        return cls(**dict(fields, vocabulary=None if vocabulary is None else tuple(vocabulary)))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order, once each."""
        if self.vocabulary is None:
            return []
        words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", prompt.lower())
        return [word for word in dict.fromkeys(words) if word not in self.vocabulary]

    def tell_unknown(self, name: str, words: list[str]) -> str:
        """What to tell about words of a prompt that the model `name` has never seen."""
        return (
            f"{name} does not know {', '.join(map(repr, words))} and will guess; it knows prompts like "
            f'"{self.example_prompt}"'
        )

    def size_warning(self, name: str, width: int, height: int, num_frames: int) -> str | None:
        """What to tell about a clip of a size that the model `name` was not trained at; None where it was, or may be.

        The sizes it was trained at are named, and the nearest is given as it is typed.
        """
        size = ClipSize(width, height, num_frames)
        if self.trained_sizes is None or size in self.trained_sizes:
            return None
        nearest = min(self.trained_sizes, key=size.distance)
        return (
            f"{name} was trained at {', '.join(map(str, self.trained_sizes))} only, and falls apart at other sizes; "
            f"this clip is {size}. Try --size {nearest.width}x{nearest.height} --num-frames {nearest.num_frames}"
        )


# Literals made of the registry's names, for the command line; the configs ask the registry itself.
if TYPE_CHECKING:
    Attention: TypeAlias = str
    AttentionBackend: TypeAlias = str
else:
    Attention, AttentionBackend = Literal[registry.names()], Literal[registry.backend_names()]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]

VIDEO, SAMPLING, ATTENTION, OUTPUT = "Video", "Sampling", "Attention", "Output"  # panels of the help
DATA, MODEL, TRAINING, MACHINE = "Data", "Model and attention", "Training", "Machine"
WHAT, HOW = "What to measure", "How to measure"

CACHE = "~/.cache/slagen"  # of hashes and prompt embeddings
MAX_SEED = 2**63 - 1


def drawn_seed(seed: int) -> int | None:
    """A seed as it is typed, -1 being none: one is drawn."""
    return None if seed == -1 else seed


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) from "i/n". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None:
        raise UsageError(f"shard is {quote(text)}, but must be i/n, such as 1/4 on the first of four machines.")
    return int(match[1]), int(match[2])


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
        sparsity: fraction of key blocks not attended exactly; None is what the weights were trained with.
        sla_topk: fraction of them that is, counted as the published code does: int(sla_topk * N) of N. At most one of
            the two; see `SLAConfig.with_topk`.
        block_m, block_n: query rows and key columns of a block; None is what the weights were trained with.
        negative_prompt: what to steer away from.
        width, height: in pixels. num_frames: video frames, 4k + 1. fps: frames a second.
        steps: denoising steps. guidance_scale, flow_shift, sampler: see ModelDefaults.
        sigma_max, ode: first noise level of the rcm sampler, and its form without fresh noise.
        vae: another VAE's file or folder, in the original or in diffusers' names.
        local_files_only: download nothing.
        seed: from 0 to 2**63 - 1; None draws one. The i-th video of a call has seed + i.
        num_videos: how many videos to make of the prompt.
        dtype: of transformer and text encoder; "auto" is bf16 on CUDA (fp16 on cards without it) and fp32 elsewhere.
        device: "auto", "cpu", "cuda" or "cuda:N".
        timing: "layer" times attention by layer, "step" by step only, "off" not at all.
        output: a path that ends in .mp4 is the file, one without a suffix or with a slash at its end a folder.
        save_latents: also write the final latents, as safetensors. overwrite: replace files that are there.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    prompt: str
    negative_prompt: str | None = option(None, "What to steer away from.", panel=VIDEO, short="-n", prompt_line=True)
    model: str | None = option(
        None,
        "A preset (slagen models lists them), a folder, or a hub id. Default: turbowan2.1-t2v-1.3b-480p with a CUDA "
        "device, tiny-wan (bundled) without.",
        panel=VIDEO, short="-m", in_key=False,
    )  # fmt: skip
    width: int | None = option(
        None, "Width x height in pixels, such as 832x480, or 480p or 720p.", panel=VIDEO, metavar="WxH", is_size=True,
        prompt_line=True,
    )  # fmt: skip
    height: int | None = option(None, "In pixels.", panel=VIDEO, hidden=True, prompt_line=True)
    num_frames: int | None = option(None, "Video frames, 4k + 1.", panel=VIDEO, prompt_line=True)
    fps: int | None = option(None, "Frames per second.", panel=VIDEO, prompt_line=True)
    num_videos: int = option(1, "How many videos; seeds count up.", panel=VIDEO, prompt_line=True, pixels=False)
    steps: int | None = option(None, "Denoising steps.", panel=SAMPLING, prompt_line=True)
    guidance_scale: float | None = option(
        None, "Weight of the prompt; 1 skips the unconditional pass.", panel=SAMPLING, prompt_line=True
    )
    flow_shift: float | None = option(
        None, "Timestep shift of the flow-matching schedule.", panel=SAMPLING, prompt_line=True
    )
    sampler: Sampler | None = option(
        None, "unipc, euler, dpm++ or rcm. Default: what the weights are for.", panel=SAMPLING
    )
    sigma_max: float | None = option(None, "First noise level of rcm, 80 unless given.", panel=SAMPLING)
    ode: bool = option(False, "Deterministic (ODE) rCM sampling.", panel=SAMPLING)
    seed: int | None = option(
        None, "Same seed, same video. Random (-1) unless given.", panel=SAMPLING, read=drawn_seed, prompt_line=True,
        in_key=False,
    )  # fmt: skip
    dtype: Dtype = option("auto", "auto: bf16 on CUDA (fp16 where a card lacks it), fp32 on a CPU.", panel=SAMPLING)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel=SAMPLING, in_key=False)
    attention: Attention = option(
        "sla", "sla; sparse or linear: one branch of it, if so trained; dense: the base model with full attention.",
        panel=ATTENTION,
    )  # fmt: skip
    backend: AttentionBackend = option(
        "auto", "Which of the method's implementations; slagen methods lists them.", panel=ATTENTION, metavar="NAME"
    )
    sparsity: float | None = option(
        None, "Fraction of key blocks not attended exactly, from 0 to below 1. Default: as trained.", panel=ATTENTION,
        prompt_line=True,
    )  # fmt: skip
    sla_topk: float | None = option(
        None,
        "Fraction of key blocks attended exactly (1 - sparsity), counted as in the published code: "
        "int(fraction x blocks).",
        panel=ATTENTION, prompt_line=True,
    )  # fmt: skip
    block_m: int | None = option(
        None, "Query rows of a block: 16, 32, 64 or 128. Default: as trained.", panel=ATTENTION
    )
    block_n: int | None = option(None, "Key columns of a block. Default: as trained.", panel=ATTENTION)
    attention_options: tuple[tuple[str, Any], ...] = ()
    weights: str | None = option(
        None, "SLA weights, or a whole transformer in any public form. Default: the model's own.", panel=ATTENTION,
        metavar="FILE_OR_FOLDER", in_key=False,
    )  # fmt: skip
    vae: str | None = option(
        None, "Another VAE, such as Wan2.1_VAE.pth.", panel=VIDEO, metavar="FILE_OR_FOLDER", in_key=False
    )
    local_files_only: bool = option(False, "Download nothing.", panel=VIDEO, pixels=False)
    allow_untrained: bool = option(False, "Run SLA whose weights are missing or zero.", panel=ATTENTION, in_key=False)
    output: str = option("outputs", "A folder, or a file that ends in .mp4.", panel=OUTPUT, short="-o", pixels=False)
    overwrite: bool = option(False, "Replace files that exist.", panel=OUTPUT, pixels=False)
    save_latents: bool = option(False, "Also write the final latents.", panel=OUTPUT, pixels=False)
    timing: Timing = option("layer", "layer, step or off: how finely attention is timed.", panel=OUTPUT, pixels=False)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UsageError(
                'the prompt is empty. Say what the video shows: slagen generate "a red circle moving right".'
            )
        check_prompt("prompt", self.prompt)
        check_prompt("negative prompt", self.negative_prompt or "")
        check_output(self.output)
        if self.sparsity is not None and self.sla_topk is not None:
            raise UsageError(
                f"--sparsity {self.sparsity} and --sla-topk {self.sla_topk} both say how many blocks are kept. "
                "Give one of them."
            )
        if self.sparsity is not None:
            check_fraction("sparsity", self.sparsity, "Try --sparsity 0.95.")
        if self.sla_topk is not None and not MIN_TOPK <= self.sla_topk <= 1:
            raise UsageError(f"sla_topk is {self.sla_topk}, but must be from {MIN_TOPK:g} to 1. Try --sla-topk 0.05.")
        for name in ("block_m", "block_n"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), BLOCK_SIZES)
        for name in ("width", "height", "num_frames", "fps", "steps", "num_videos", "seed"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise UsageError(f"{name} is {shown(value)}, but must be a whole number.")
        for name, most in MAX_OF_A_CLIP.items():
            value = getattr(self, name)
            if value is not None and value > most:
                known = {"num_frames": "--num-frames 81", "fps": "--fps 16", "num_videos": "--num-videos 4"}
                advice = known.get(name, "--size 832x480")
                raise UsageError(f"{name} is {shown(value)}, but must be at most {most:,}. Try {advice}.")
        if self.num_frames is not None and (self.num_frames < 1 or self.num_frames % 4 != 1):
            nearest = max(1, round((self.num_frames - 1) / 4) * 4 + 1)
            raise UsageError(
                f"num_frames is {shown(self.num_frames)}, but Wan decodes 4k + 1 frames. Try --num-frames {nearest}."
            )
        for name in ("width", "height", "fps", "steps", "num_videos"):
            value = getattr(self, name)
            if value is not None and value < 1:
                example = "--size 832x480" if name in ("width", "height") else f"--{name.replace('_', '-')} 1"
                raise UsageError(f"{name} is {shown(value)}, but must be at least 1. Try {example}.")
        if self.steps is not None and self.steps > 1000:
            raise UsageError(f"steps is {self.steps}, but the sampler has 1000 time steps. Try --steps 50.")
        if (self.width is None) != (self.height is None):
            raise UsageError("only one of width and height is given. Give both: --size 832x480.")
        for name, example in (("guidance_scale", "5"), ("flow_shift", "3"), ("sigma_max", "80")):
            value = getattr(self, name)
            least = 0.0 if name == "guidance_scale" else MIN_STRENGTH
            if value is not None and not least <= value <= MAX_STRENGTH:
                raise UsageError(
                    f"{name} is {shown(value)}, but must be from {least:g} to {MAX_STRENGTH:g}. "
                    f"Try --{name.replace('_', '-')} {example}."
                )
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed is {shown(self.seed)}, but must be from 0 to 2**63 - 1. Try --seed 42.")
        if self.seed is not None and self.seed > MAX_SEED - self.num_videos + 1:
            raise UsageError(
                f"seed is {self.seed} and num_videos is {self.num_videos}, but the last video's seed must be at most "
                f"2**63 - 1. Try --seed {MAX_SEED - self.num_videos + 1}."
            )
        for name, choices in (
            ("timing", Timing), ("dtype", Dtype), ("sampler", Sampler),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in get_args(choices) and (name, value) != ("sampler", None):
                raise UsageError(f"{name} is {shown(value)}, but must be one of {', '.join(get_args(choices))}.")
        self._check_attention()

    def _check_attention(self) -> None:
        """Raise UsageError for a method that there is not, and for what it does not take."""
        method = registry.get(self.attention)
        if method.family == "dense" and (self.sparsity is not None or self.sla_topk is not None):
            raise UsageError("dense attention keeps every block, so it takes no sparsity. Leave --sparsity out.")
        if method.family == "dense" and (self.block_m is not None or self.block_n is not None):
            raise UsageError("dense attention has no blocks. Leave --block-m and --block-n out.")
        for name, value in self.attention_settings.items():
            if value is not None and name not in method.option_names:
                taken = ", ".join(method.option_names) or "none"
                raise UsageError(f"{name} is no option of {method.name} attention (it has: {taken}). Leave it out.")
        method.config(**dict(self.attention_options))  # it checks what is out of range
        method.check_backend(self.backend)

    @property
    def attention_settings(self) -> dict[str, Any]:
        """What is asked for of the attention method, by option; None where nothing is."""
        own = {name: getattr(self, name) for name in ("sparsity", "sla_topk", "block_m", "block_n")}
        return {**own, **dict(self.attention_options)}

    def with_dense_attention(self) -> "GenerateConfig":
        """The same with dense attention, without the options of another method."""
        none = dict.fromkeys(("sparsity", "sla_topk", "block_m", "block_n"))
        return dataclasses.replace(self, attention="dense", backend="auto", attention_options=(), **none)  # type: ignore[arg-type]

    @property
    def slug(self) -> str:
        """The prompt as a part of a file name."""
        plain = unicodedata.normalize("NFKD", self.prompt.lower()).encode("ascii", "ignore").decode()
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-") or "video"


@dataclass(frozen=True)
class BatchConfig:
    """One call of `slagen batch`.

    Args:
        prompts: a prompt file, or "-" for stdin.
        generate: the settings of every prompt that says nothing else; its own prompt is not used.
        retry_failed: try again what failed before.
        shard: (i, n): make each n-th job alone, from the i-th on, 1 being the first.
        cache_dir: where hashes and prompt embeddings are kept. no_cache: keep no embeddings.
        ray_address: of a Ray cluster that shares the work; "local" starts one on this machine, None uses no Ray.
        ray_workers: how many of its actors; None is one for each GPU, or for each machine where there is none.
    Raises: UsageError for a shard that is none, or workers without Ray.
    """

    prompts: str
    generate: GenerateConfig
    retry_failed: bool = option(False, "Try again what failed before.")
    shard: tuple[int, int] | None = option(
        None, "i/n: every n-th job from the i-th on, for n machines.", metavar="I/N", kind=str, read=parse_shard
    )
    cache_dir: str = option(CACHE, "Where prompt embeddings and hashes are kept.")
    no_cache: bool = option(False, "Keep no embeddings.")
    ray_address: str | None = option(
        None,
        "Share the work on the Ray cluster at this address; if it wants a token, give that in RAY_AUTH_TOKEN, or its "
        "file in RAY_AUTH_TOKEN_PATH.",
        metavar="HOST:PORT",
    )
    ray_workers: int | None = option(None, "Models in memory at once. Default: one a GPU, or one a machine without.")

    def __post_init__(self) -> None:
        if self.ray_workers is not None and (not 1 <= self.ray_workers <= MAX_VIDEOS or self.ray_address is None):
            raise UsageError(f"ray_workers is {self.ray_workers}, but must be from 1 to {MAX_VIDEOS}, and needs --ray.")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"shard is {self.shard[0]}/{self.shard[1]}, but must be i/n from 1/n to n/n. Try 1/2.")


# Self-attention calls of real models: batch, heads, tokens, head dimension.
SHAPES = {
    "wan-1.3b-480p": (1, 12, 32760, 128),  # 832x480, 81 frames
    "wan-1.3b-720p": (1, 12, 75600, 128),  # 1280x720, 81 frames
    "wan-14b-480p": (1, 40, 32760, 128),
    "wan-14b-720p": (1, 40, 75600, 128),
    "tiny-wan": (1, 4, 320, 64),
}
RandomInit = Literal["wan-1.3b", "wan-14b"]


@dataclass(frozen=True)
class BenchConfig:
    """One call of `slagen bench`.

    Args:
        shapes: names of SHAPES, or "BxHxLxD". Not used with `model` or `random_init`.
        sparsities: which to measure; empty sweeps 0.8, 0.9, 0.95 and 0.97 for a shape, and 0.95 for a model.
        methods: names of `slagen.benchmark.run.METHODS`; empty is all that run here.
        backend: which implementation of SLA.
        linear_domain, feature_map, block_m, block_n: as in SLAConfig.
        dtype: "auto" is bf16 on CUDA and fp32 elsewhere. device: "auto", "cpu", "cuda" or "cuda:N".
        backward: also time the backward pass; None does on CUDA.
        lengths: token counts of the length sweep; None doubles from 1,024 up to the shape's, () sweeps none.
        seconds: time for each measurement, at least three repeats.
        model: time the denoising loop of this preset, folder or hub id instead.
        random_init: the same for a randomly initialised Wan of this size.
        width, height, num_frames, steps: of the denoising loop; None is the model's own size, and 4 steps.
        compile: run the denoising loop once more with every block of the transformer compiled.
        output: a folder for bench.json, bench.md, bench.png and bench.svg; None writes nothing.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    shapes: tuple[str, ...] = option(
        ("wan-1.3b-480p",),
        f"{', '.join(SHAPES)}, or batch x heads x tokens x head dimension, such as 1x12x8192x128. May be repeated. "
        "Default: wan-1.3b-480p.",
        panel=WHAT, name="shape",
    )  # fmt: skip
    sparsities: tuple[float, ...] = option(
        (), "May be repeated. Default: 0.8, 0.9, 0.95 and 0.97; for a model 0.95.", panel=WHAT, name="sparsity"
    )
    methods: tuple[str, ...] = option(
        (),
        "sla, sparse, sdpa, sdpa-flash, sdpa-cudnn, sdpa-efficient, sdpa-math, flash-attn, sage, flashinfer, flex, "
        "cudnn-blocks, flashinfer-blocks or sla-public. May be repeated. Default: all.",
        panel=WHAT, name="method",
    )  # fmt: skip
    lengths: tuple[int, ...] | None = option(
        None,
        "Tokens, for the length sweep; may be repeated. Default: doubling from 1,024 up to the shape's.",
        panel=WHAT, name="length",
    )  # fmt: skip
    model: str | None = option(
        None, "Time this model's denoising loop: a preset, folder or hub id.", panel=WHAT, short="-m"
    )
    random_init: RandomInit | None = option(
        None, "The same for a random Wan of true size: wan-1.3b or wan-14b.", panel=WHAT
    )
    width: int | None = option(None, "Width x height of the loop, in pixels.", panel=WHAT, metavar="WxH", is_size=True)
    height: int | None = option(None, "In pixels.", panel=WHAT, hidden=True)
    num_frames: int | None = option(None, "Video frames of the loop.", panel=WHAT)
    steps: int = option(4, "Denoising steps of the loop.", panel=WHAT)
    compile: bool = option(False, "Time the loop with torch.compile as well.", panel=WHAT)
    backend: Backend = option("auto", "SLA's implementation: auto, reference, torch or triton.", panel=HOW)
    linear_domain: LinearDomain = option("all", "What the linear branch sees: all or marginal.", panel=HOW)
    feature_map: FeatureMap = option("softmax", "softmax, elu or relu.", panel=HOW)
    block_m: int = option(64, "Query rows of a block.", panel=HOW)
    block_n: int = option(64, "Key columns of a block.", panel=HOW)
    dtype: Dtype = option("auto", "auto: bf16 on CUDA, fp32 on a CPU.", panel=HOW)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel=HOW)
    backward: bool | None = option(None, "Time the backward pass too. Default: on CUDA.", panel=HOW)
    seconds: float = option(2.0, "Time for each measurement.", panel=HOW)
    output: str | None = option(None, "A folder for bench.json, .md, .png and .svg.", panel=OUTPUT, short="-o")

    def __post_init__(self) -> None:
        check_folder("output", self.output or "")
        if self.model is not None and self.random_init is not None:
            raise UsageError("--model and --random-init both say which model to time. Give one of them.")
        for shape in self.shapes:
            self._check_room(shape)
        for sparsity in self.sparsities or (0.95,):
            self.sla(sparsity)  # checks the fraction and the blocks
        if not 0 < self.seconds <= 3600:
            raise UsageError(f"seconds is {self.seconds}, but must be above 0, and at most 3600. Try --seconds 2.")
        GenerateConfig("-", width=self.width, height=self.height, num_frames=self.num_frames, steps=self.steps)

    def _check_room(self, shape: str) -> None:
        """Raise UsageError for lengths that no machine holds."""
        batch, num_heads, length, head_dim = parse_shape(shape)
        for tokens in (length, *(self.lengths or ())):
            if not 1 <= tokens <= MAX_ELEMENTS // (batch * num_heads * head_dim):
                raise UsageError(
                    f"{batch} x {num_heads} x {shown(tokens)} x {head_dim} is more than {MAX_ELEMENTS:,} numbers, or "
                    "none: a sequence has at least 1 token. Try --length 4096."
                )

    def sla(self, sparsity: float) -> SLAConfig:
        """The attention that is measured at one sparsity."""
        return SLAConfig(
            sparsity=sparsity,
            linear_domain=self.linear_domain,
            feature_map=self.feature_map,
            block_m=self.block_m,
            block_n=self.block_n,
        )


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """(B, H, L, D) of a name in SHAPES or of "BxHxLxD". Raises UsageError."""
    if text in SHAPES:
        return SHAPES[text]
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,7})x(\d{1,4})", text.strip().lower())
    sizes = tuple(int(number) for number in match.groups()) if match else ()
    if len(sizes) != 4 or 0 in sizes:
        raise UsageError(
            f"shape is {shown(text)}, but must be one of {', '.join(SHAPES)}, or batch x heads x tokens x head "
            "dimension. Try --shape 1x12x8192x128."
        )
    return sizes  # type: ignore[return-value]


Loss = Literal["distill", "flow"]
Trained = Literal["all", "attn", "proj", "lora"]
Optimizer = Literal["adamw", "adamw8bit"]
Parallel = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to train on, and in what form.

    Args:
        path: raw or prepared data; None where the model makes its own.
        self_generate: a prompt file whose videos the dense model makes, to be distilled on.
        clips_per_prompt: how many clips of each such prompt to train on, 4 unless given; one more is held out.
        held_out: clips of a data set that are never trained on; None is a tenth, from 1 to 16.
        width, height, num_frames, fps: the size of clips, whose area and length no clip exceeds; None is the model's.
    Raises: UsageError if a value is out of range, or no data or two kinds of it are given.
    """

    path: str | None = option(
        None, "Videos with captions (see finetune data), or prepared.", panel=DATA, name="data", metavar="PATH"
    )
    self_generate: str | None = option(
        None, "No videos: a prompt file, of which the dense model makes clips.", panel=DATA, metavar="FILE"
    )
    clips_per_prompt: int | None = option(
        None, "How many clips of each, unless its line has --num-videos; one more is held out. Default: 4.", panel=DATA
    )
    held_out: int | None = option(None, "Videos to hold out. Default: a tenth, from 1 to 16.", panel=DATA)
    width: int | None = option(None, "Clips of this area, width x height.", panel=DATA, metavar="WxH", is_size=True)
    height: int | None = option(None, "In pixels.", panel=DATA, hidden=True)
    num_frames: int | None = option(None, "The longest clip, 4k + 1.", panel=DATA)
    fps: int | None = option(None, "Frames per second of clips.", panel=DATA)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.self_generate is None):
            raise UsageError("give either --data FOLDER with videos, or --self-generate FILE with prompts.")
        for name in ("clips_per_prompt", "held_out"):
            _check_count(name, getattr(self, name))
        if self.held_out is not None and self.self_generate is not None:
            raise UsageError("--self-generate holds out one clip of each prompt. Leave --held-out out.")
        if self.clips_per_prompt is not None and self.path is not None:
            raise UsageError("--clips-per-prompt is for --self-generate; of videos every one is a clip. Leave it out.")
        GenerateConfig("-", width=self.width, height=self.height, num_frames=self.num_frames, fps=self.fps)


@dataclass(frozen=True)
class FinetuneConfig:
    """One call of `slagen finetune`. What is None is the model's own default.

    Args:
        data: what to train on.
        model: preset, folder or hub id; None is Wan2.1 1.3B on CUDA and the bundled model elsewhere.
        weights: SLA weights to go on from, or a whole transformer; None takes the model's own.
        from_dense: begin with the model's dense weights and a fresh `proj_l`.
        output: a folder for `sla.safetensors`, checkpoints, log, clips and page, and for the transformer where
            `weights` is a whole one of your own.
        attention: "sla", or one of its branches alone; "dense" for a control that is tuned as long.
        sparsity, and the five after it: as in SLAConfig; None is what the weights were trained with, or SLAConfig's.
        anneal_from: sparsity to begin with; it rises to `sparsity` over the first half of the steps.
        loss: "distill" is the squared difference of the student's velocity from the frozen dense model's on the same
            noisy latents, "flow" from the data's. layer_loss: weight of the same for every layer's attention.
        train: "all" of the transformer, "attn": its self-attention, "proj": `proj_l` alone, or "lora": low-rank
            changes of self-attention, of rank `lora_rank` (None is 32), and `proj_l`.
        steps, lr, proj_multiplier, warmup_steps, batch_size, micro_batch, caption_dropout: see TrainingDefaults.
        weight_decay: of AdamW. max_grad_norm: longer gradients are cut to it; None cuts none.
        optimizer: "adamw8bit" keeps its state in 8 bits (bitsandbytes).
        checkpointing: recompute activations in the backward pass; None does on CUDA.
        seed: of noise and order. dtype: to compute in; weights stay in float32. device, backend: as in GenerateConfig.
        parallel: how the processes of torchrun share the model: "ddp" copies it, "fsdp" splits it; "auto" copies.
        context_parallel: processes that share one clip's tokens.
        save_every, validate_every: steps between checkpoints, and between validations with clips; None is a tenth of
            all steps, at least 10, for the first, and half of them for the second.
        restart: begin anew although the output folder holds a checkpoint.
        tensorboard: also write TensorBoard's event files.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    data: DataConfig = option(dataclasses.MISSING, in_key=False)
    model: str | None = option(
        None, "A preset, folder or hub id. Default: wan2.1-t2v-1.3b with a CUDA device, tiny-wan (bundled) without.",
        panel=MODEL, short="-m",
    )  # fmt: skip
    weights: str | None = option(
        None, "SLA weights to start from, or a transformer.", panel=MODEL, metavar="FILE_OR_FOLDER", in_key=False
    )
    from_dense: bool = option(False, "Begin with dense weights and a fresh proj_l.", panel=MODEL)
    local_files_only: bool = option(False, "Download nothing.", panel=MODEL, pixels=False)
    attention: Attention = option("sla", "sla; to compare: sparse or linear, one branch of it, or dense.", panel=MODEL)
    sparsity: float | None = option(None, "Default: as the model's SLA has it, or 0.95.", panel=MODEL)
    negligible: float | None = option(None, "Fraction of blocks neither branch sees.", panel=MODEL)
    linear_domain: LinearDomain | None = option(None, "What the linear branch sees: all or marginal.", panel=MODEL)
    feature_map: FeatureMap | None = option(None, "softmax, elu or relu.", panel=MODEL)
    block_m: int | None = option(None, "Query rows of a block.", panel=MODEL)
    block_n: int | None = option(None, "Key columns of a block.", panel=MODEL)
    anneal_from: float | None = option(None, "Sparsity to begin with; it rises over half of the steps.", panel=MODEL)
    loss: Loss = option("distill", "distill: the dense model's velocity; flow: the data's.", panel=TRAINING)
    layer_loss: float = option(0.0, "Weight of each layer's attention error.", panel=TRAINING)
    train: Trained = option("all", "all, attn, proj or lora (and proj_l).", panel=TRAINING)
    lora_rank: int | None = option(None, "Rank of lora. Default: 32.", panel=TRAINING)
    steps: int | None = option(None, "Optimiser steps. Default, as of the six below: the model's own.", panel=TRAINING)
    lr: float | None = option(None, "Learning rate.", panel=TRAINING)
    proj_multiplier: float | None = option(None, "Factor on it for proj_l.", panel=TRAINING)
    warmup_steps: int | None = option(None, "Steps it rises over, at most a tenth.", panel=TRAINING)
    batch_size: int | None = option(None, "Clips a step, over all processes.", panel=TRAINING)
    micro_batch: int | None = option(None, "Clips at a time on one device.", panel=TRAINING, pixels=False)
    caption_dropout: float | None = option(
        None, "Fraction trained on the negative prompt, for guidance.", panel=TRAINING
    )
    weight_decay: float = option(0.01, "Of AdamW.", panel=TRAINING)
    max_grad_norm: float | None = option(None, "Clip gradients to this norm. Default: no clipping.", panel=TRAINING)
    optimizer: Optimizer = option("adamw", "adamw or adamw8bit (not with fsdp).", panel=TRAINING)
    checkpointing: bool | None = option(
        None, "Recompute activations, to save memory. Default: on CUDA.", panel=MACHINE, pixels=False
    )
    seed: int = option(0, "Of noise, order, and which clips are held out.", panel=TRAINING)
    dtype: Dtype = option(
        "auto", "To compute in: auto (bf16 on CUDA that has it, else fp32), bf16 or fp32.", panel=MACHINE
    )
    device: str = option("auto", "auto, cpu or cuda.", panel=MACHINE, pixels=False)
    backend: Backend = option("auto", "SLA's implementation: auto, reference, torch or triton.", panel=MACHINE)
    parallel: Parallel = option(
        "auto", "Under torchrun: ddp copies the model, fsdp splits it.", panel=MACHINE, pixels=False
    )
    context_parallel: int = option(
        1, "Under torchrun: processes that share a clip's tokens.", panel=MACHINE, pixels=False
    )
    save_every: int | None = option(
        None, "Steps between checkpoints. Default: a tenth, at least 10.", panel=OUTPUT, pixels=False
    )
    validate_every: int | None = option(
        None, "Steps between validations with clips. Default: half.", panel=OUTPUT, pixels=False
    )
    restart: bool = option(False, "Begin anew in a folder with a checkpoint.", panel=OUTPUT, pixels=False)
    tensorboard: bool = option(False, "Write event files too.", panel=OUTPUT, pixels=False)
    output: str = option(
        "finetuned", "A folder for weights, checkpoints, log and page.", panel=OUTPUT, short="-o", pixels=False
    )

    def __post_init__(self) -> None:
        check_folder("output", self.output)
        for name, kinds in (("loss", Loss), ("train", Trained), ("optimizer", Optimizer),
                            ("dtype", Dtype), ("backend", Backend), ("parallel", Parallel)):  # fmt: skip
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(
                    f"{name} is {shown(getattr(self, name))}, but must be one of {', '.join(get_args(kinds))}."
                )
        for name in ("steps", "batch_size", "micro_batch", "lora_rank", "context_parallel", "save_every",
                     "validate_every"):  # fmt: skip
            _check_count(name, getattr(self, name))
        for name in ("lr", "proj_multiplier", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}, but must be above 0. The model's own runs when it is left out.")
        for name in ("weight_decay", "layer_loss", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TRAINING.get(name, MAX_STRENGTH):
                raise UsageError(
                    f"{name} is {shown(value)}, but must be 0 or above, and no more than a training can have. Leave it "
                    "out for the default."
                )
        for name, example in (("sparsity", 0.95), ("negligible", 0.1), ("anneal_from", 0.5), ("caption_dropout", 0.1)):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name), f"Try --{name.replace('_', '-')} {example}.")
        for name in ("block_m", "block_n"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), BLOCK_SIZES)
        method = registry.get(self.attention)
        is_dense = method.family == "dense"
        if not is_dense and method.config is not SLAConfig:
            raise UsageError(f"{method.name} attention cannot be fine-tuned yet. Try --attention sla.")
        if is_dense and (self.loss != "flow" or self.train not in ("all", "attn")):
            raise UsageError(
                "--attention dense has nothing to learn from itself, and no proj_l. Give --loss flow and --train all."
            )
        for name in ("sparsity", "negligible", "linear_domain", "feature_map", "block_m", "block_n", "anneal_from"):
            if is_dense and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is for SLA, but the attention is dense. Leave --{name.replace('_', '-')} out."
                )
        if self.lora_rank is not None and self.train != "lora":
            raise UsageError(f"--lora-rank is for --train lora, but this is {self.train}. Leave it out.")
        learns = any(group.used for group in method.parameters)
        if self.proj_multiplier is not None and not learns:
            raise UsageError(f"{self.attention} attention has no proj_l for --proj-multiplier. Leave it out.")
        if not learns and not is_dense and self.train == "proj":
            raise UsageError(f"--train proj with --attention {method.name} leaves nothing to train. Try --train attn.")
        if self.layer_loss > 0 and self.loss == "flow":
            raise UsageError("--layer-loss compares with the dense teacher, which --loss flow has not. Leave one out.")
        if self.dtype == "fp16":
            raise UsageError("small gradients are lost in fp16. Try --dtype bf16, or fp32.")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed is {shown(self.seed)}, but must be from 0 to 2**63 - 1. Try --seed 42.")

    def sla(self, trained: SLAConfig | None) -> SLAConfig:
        """The attention that is trained: what is asked for, in place of what the weights were made with."""
        names = ("sparsity", "negligible", "linear_domain", "feature_map", "block_m", "block_n")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        base = trained or SLAConfig()
        if given.get("linear_domain") == "all" and "negligible" not in given:
            base = dataclasses.replace(base, negligible=0.0)
        return dataclasses.replace(base, **given)
