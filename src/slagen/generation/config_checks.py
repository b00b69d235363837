"""What GenerateConfig refuses: an attention that there is not, and options that do not go together. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.attention import registry
from slagen.attention.policy import AttentionPolicy
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.paths import GIF, VIDEO, WEBM, check_output, is_video, kind_of_output, user_path
from slagen.io.text import check_prompt, counted, quote_path
from slagen.wan.defaults import MAX_OF_A_CLIP

if TYPE_CHECKING:
    from slagen.generation.config import GenerateConfig

MAX_CRF = {VIDEO: 51, WEBM: 63}  # what x264 and VP9 take
MAX_GIF_FPS = 50  # a GIF counts in hundredths of a second, and players show a frame for two of them or more
MOVES_LAYERS = ("group", "sequential")  # of --offload: parts of blocks are moved to the GPU one by one
# What is counted, with an option that an error suggests.
COUNTS = {
    "width": "--size 832x480", "height": "--size 832x480", "num_frames": "--num-frames 81", "fps": "--fps 16",
    "steps": "--steps 50", "num_videos": "--num-videos 4", "measure_dense": "--measure-dense 3",
    "preview": "--preview 5",
}  # fmt: skip


def check_texts(config: GenerateConfig) -> None:
    """Raise UsageError for an empty prompt, for what no prompt may hold, and for an output that is no path."""
    if not config.prompt.strip():
        raise UsageError('the prompt is empty. Describe the video, for example "a red circle moving right".')
    check_prompt("prompt", config.prompt)
    check_prompt("negative prompt", config.negative_prompt or "")
    check_output(config.output)


def check_whole_numbers(config: GenerateConfig) -> None:
    """Raise UsageError for a count that is not a whole number or out of range."""
    for name in (*COUNTS, "seed"):
        value = getattr(config, name)
        if value is not None and type(value) is not int:
            raise UsageError(f"{name} is {shown(value)}, but must be a whole number.")
    for name, most in MAX_OF_A_CLIP.items():
        value = getattr(config, name)
        if value is not None and value > most:
            raise UsageError(f"{name} is {shown(value)}, but must be at most {most:,}. Try {COUNTS[name]}.")
    if config.num_frames is not None and (config.num_frames < 1 or config.num_frames % 4 != 1):
        nearest = max(1, round((config.num_frames - 1) / 4) * 4 + 1)
        raise UsageError(
            f"num_frames is {shown(config.num_frames)}, but must be a multiple of 4, plus 1. "
            f"Try --num-frames {nearest}."
        )
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            example = COUNTS[name] if name in ("width", "height") else f"--{name.replace('_', '-')} 1"
            raise UsageError(f"{name} is {shown(value)}, but must be at least 1. Try {example}.")
    if config.steps is not None and config.steps > 1000:
        raise UsageError(
            f"steps is {config.steps}, but the sampler has 1000 timesteps, so at most 1000 steps are "
            "possible. Try --steps 50."
        )
    if (config.width is None) != (config.height is None):
        raise UsageError("only one of width and height is given. Give both: --size 832x480.")


def check_measurement(config: GenerateConfig) -> None:
    """Raise UsageError for steps to run with dense attention too where that says nothing."""
    count = config.measure_dense
    if count is None:
        return
    if registry.get(config.attention).family == "dense":
        raise UsageError(
            "--measure-dense compares with dense attention, which this run uses already. Leave it out, or give another "
            "--attention."
        )
    if config.timing == "off":
        raise UsageError("--measure-dense measures times, but --timing off takes none. Leave one of them out.")
    if config.steps is not None and count > config.steps:
        raise UsageError(
            f"measure_dense is {count}, but the run has only {counted(config.steps, 'step')}. "
            f"Try --measure-dense {min(3, config.steps)}."
        )


def check_offload(config: GenerateConfig) -> None:
    """Raise UsageError for parts of a model that are to be moved to a GPU on a device that is none."""
    if config.offload not in ("auto", "none") and config.device == "cpu":
        raise UsageError(
            f"--offload {config.offload} moves parts of the model to a GPU, but --device is cpu. Leave --offload out."
        )


def check_together(config: GenerateConfig) -> None:
    """Raise UsageError for options that do not go together."""
    check_offload(config)
    check_compile(config)
    check_cache(config)
    check_attention(config)
    check_measurement(config)
    check_trace(config)
    check_encoding(config.output, config.crf, config.fps)


def check_cache(config: GenerateConfig) -> None:
    """Raise UsageError for what a run that skips blocks cannot be."""
    if config.cache is None:
        return
    if config.compile:
        raise UsageError(
            "--cache decides before each block whether it runs, which compiled blocks do not. Leave one of --cache and "
            "--compile out."
        )
    if config.measure_dense is not None:
        raise UsageError(
            "--measure-dense runs steps once more, which --cache would take for further ones. Leave one of them out."
        )
    if registry.get(config.attention).memory is not None:
        raise UsageError(
            f"{config.attention} attention remembers its last step in each layer, and --cache skips layers. Leave "
            "--cache out, or give another --attention."
        )


def check_compile(config: GenerateConfig) -> None:
    """Raise UsageError for what cannot be had of compiled blocks."""
    if not config.compile:
        return
    if config.offload in MOVES_LAYERS:
        raise UsageError(
            f"--compile needs whole blocks on the GPU, but --offload {config.offload} moves parts of them. "
            "Leave one of them out, or try --offload model."
        )
    if config.live_lora:
        raise UsageError(
            "--compile would compile a LoRA that is not merged anew for each of its scales. Leave --no-lora-merge out, "
            "or --compile."
        )
    if config.timing == "part" or config.measure_dense is not None:
        option = "--timing part" if config.timing == "part" else "--measure-dense"
        raise UsageError(
            f"{option} times attention, which is not timed by itself in compiled blocks. Leave one of "
            f"{option} and --compile out."
        )


def check_trace(config: GenerateConfig) -> None:
    """Raise UsageError for a trace that is no .json file of its own, or one file for several videos."""
    if config.trace is None:
        return
    if not config.trace.lower().endswith(".json"):
        raise UsageError(f"trace is {quote_path(config.trace)}, but must be a file that ends in .json.")
    if config.num_videos > 1:
        raise UsageError(f"--trace writes one file, but --num-videos is {config.num_videos}. Leave one of them out.")
    if is_video(config.output) and user_path(config.trace) == user_path(config.output).with_suffix(".json"):
        raise UsageError(
            f"trace is {quote_path(config.trace)}, which is the report of {quote_path(config.output)}. "
            "Give another name."
        )


def check_attention(config: GenerateConfig) -> None:
    """Raise UsageError for a method that there is not, and for what it does not take."""
    method = registry.get(config.attention)
    given = [name for name in ("sparsity", "sla_topk", "sparsity_schedule") if getattr(config, name) is not None]
    if method.family == "dense" and given:
        names = "--sparsity-schedule" if given == ["sparsity_schedule"] else "--sparsity and --keep"
        raise UsageError(f"dense attention has no sparsity. Leave {names} out.")
    if method.family == "dense" and (config.block_m is not None or config.block_n is not None):
        raise UsageError("dense attention has no blocks. Leave --block-m and --block-n out.")
    needed = {"sparsity_schedule": "sparsity"}  # the option that a method with this one has
    for name, value in {**config.attention_settings, "sparsity_schedule": config.sparsity_schedule}.items():
        if value is not None and needed.get(name, name) not in method.option_names:
            own = needed.get(name, name)
            others = [f", or give --attention {other}" for other in registry.with_option(own)[:1]]
            raise UsageError(
                f"{name} is not an option of {method.name} attention, but of {registry.takers(own)}. "
                f"Leave it out{''.join(others)}."
            )
    method.config(**dict(config.attention_options))  # it checks what is out of range
    method.check_backend(config.backend)
    if config.policy != AttentionPolicy() and method.family == "dense":
        raise UsageError(
            "--dense-steps, --dense-layers, --min-tokens and --delta are not for dense attention. Leave them out."
        )


def check_encoding(output: str, crf: int | None, fps: int | None) -> None:
    """Raise UsageError for a --crf that an output has not, and for more frames a second than a GIF can have."""
    kind = kind_of_output(output)
    if kind == GIF and fps is not None and fps > MAX_GIF_FPS:
        raise UsageError(f"fps is {fps}, but a GIF has at most {MAX_GIF_FPS} frames a second. Try --fps {MAX_GIF_FPS}.")
    if crf is None:
        return
    if kind not in MAX_CRF:
        raise UsageError(
            f"--crf is for {VIDEO} and {WEBM}, but the output is {quote_path(output)}. Leave it out, or give another "
            "--output."
        )
    if type(crf) is not int or not 0 <= crf <= MAX_CRF[kind]:
        raise UsageError(
            f"crf is {shown(crf)}, but must be a whole number from 0 to {MAX_CRF[kind]} for {kind}. Try --crf 18."
        )
