"""The `slagen` command: parse, build a config, call one function, show its result."""

import os
import re
import sys
import traceback
from typing import Annotated, Any

import typer

from slagen import __version__
from slagen.config import Attention, Backend, Dtype, GenerateConfig, Timing
from slagen.errors import SlagenError, UsageError

# Other tools' spellings of our options; they work, and stay out of the help. Underscores count as dashes.
ALIASES = {
    "num-inference-steps": "steps", "sample-steps": "steps", "infer-steps": "steps", "num-steps": "steps",
    "sample-guide-scale": "guidance-scale", "cfg": "guidance-scale",
    "sample-shift": "flow-shift", "shift": "flow-shift",
    "frame-num": "num-frames", "video-length": "num-frames",
    "base-seed": "seed",
    "num-videos-per-prompt": "num-videos", "num-samples": "num-videos",
    "topk": "sla-topk",
    "attention-backend": "attention", "attention-type": "attention", "attn-mode": "attention",
    "model-path": "model", "ckpt-dir": "model",
    "dit-path": "weights", "dit": "weights", "sla-weights": "weights",
    "save-file": "output", "save-path": "output", "output-path": "output",
}  # fmt: skip


def normalize(token: str) -> str:
    """An option's name, without its leading dashes, as we spell it: dashes for underscores, our name for another's."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)


INTERRUPTED = 130

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "token_normalize_func": normalize}

app = typer.Typer(
    name="slagen",
    no_args_is_help=True,
    context_settings=CONTEXT,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slagen {__version__}")
        raise typer.Exit


@app.callback()
def slagen(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fast video from Wan2.1: sparse-linear attention, and a report of where the time went.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 part of a batch failed, 4 environment (no GPU, package, driver
    or hub), 5 weights that do not fit, 6 a gate failed, 130 interrupted. SLAGEN_DEBUG=1 adds the traceback.
    """


VIDEO, SAMPLING, ATTENTION, OUTPUT = "Video", "Sampling", "Attention", "Output"


@app.command(no_args_is_help=True, context_settings=CONTEXT)
def generate(
    words: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the video shows; - reads it from stdin.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, instead of the argument.", rich_help_panel=VIDEO)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="What to steer away from.", rich_help_panel=VIDEO)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            rich_help_panel=VIDEO,
            help="tiny-wan (bundled), wan2.1-1.3b, wan2.1-14b, a folder, or a hub id. Default: wan2.1-1.3b with a CUDA "
            "device, tiny-wan without.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Width x height in pixels, such as 832x480.", rich_help_panel=VIDEO, metavar="WxH"),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Video frames, 4k + 1.", rich_help_panel=VIDEO)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.", rich_help_panel=VIDEO)] = None,
    num_videos: Annotated[int, typer.Option(help="How many videos; seeds count up.", rich_help_panel=VIDEO)] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Weight of the prompt; 1 skips the unconditional pass.", rich_help_panel=SAMPLING),
    ] = None,
    flow_shift: Annotated[
        float | None, typer.Option(help="Lean of the sampler towards noise.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same video. Random (-1) unless given.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="auto, bf16, fp16 or fp32. auto: bf16 on CUDA, fp32 on a CPU.", rich_help_panel=SAMPLING),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=SAMPLING)] = "auto",
    attention: Annotated[
        Attention,
        typer.Option(
            rich_help_panel=ATTENTION,
            help="sla; sparse or linear: one branch of it; dense: the base model with full attention.",
        ),
    ] = "sla",
    backend: Annotated[
        Backend, typer.Option(help="SLA's implementation: auto, reference, torch or triton.", rich_help_panel=ATTENTION)
    ] = "auto",
    sparsity: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=ATTENTION,
            show_default=False,
            help="Fraction of key blocks not attended exactly, from 0 to below 1. Default: as trained.",
        ),
    ] = None,
    sla_topk: Annotated[
        float | None,
        typer.Option(help="1 - sparsity: the fraction that is.", rich_help_panel=ATTENTION, show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="SLA weights: an sla.safetensors or a folder with one. Default: beside the model.",
            rich_help_panel=ATTENTION,
            metavar="FILE_OR_FOLDER",
        ),
    ] = None,
    allow_untrained: Annotated[
        bool,
        typer.Option("--allow-untrained", help="Run SLA whose weights are missing or zero.", rich_help_panel=ATTENTION),
    ] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A folder, or a file that ends in .mp4.", rich_help_panel=OUTPUT)
    ] = "outputs",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)
    ] = False,
    save_latents: Annotated[
        bool, typer.Option("--save-latents", help="Also write the final latents.", rich_help_panel=OUTPUT)
    ] = False,
    timing: Annotated[
        Timing, typer.Option(help="layer, step or off: how finely attention is timed.", rich_help_panel=OUTPUT)
    ] = "layer",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make a video of a prompt, and beside it a report of where every step's attention time went.

    Example: slagen generate "a red circle moving right" --seed 7 --output circle.mp4
    """
    width, height = parse_size(size)
    config = GenerateConfig(
        prompt=read_prompt(words, prompt),
        model=model,
        weights=weights,
        allow_untrained=allow_untrained,
        attention=attention,
        backend=backend,
        sparsity=sparsity,
        sla_topk=sla_topk,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        seed=None if seed == -1 else seed,
        num_videos=num_videos,
        dtype=dtype,
        device=device,
        timing=timing,
        output=output,
        save_latents=save_latents,
        overwrite=overwrite,
    )
    from slagen import console

    with console.GenerateProgress() as progress:
        from slagen import generate as task

        result = task.generate(config, progress)
    console.show_videos(result, as_json)


def read_prompt(words: str | None, option: str | None) -> str:
    """The prompt from the argument, the option or stdin. Raises UsageError if two or none are given."""
    if words is not None and option is not None:
        raise UsageError("the prompt is given twice, as an argument and with --prompt. Give one of them.")
    text = words if words is not None else option
    if text is None:
        raise UsageError('no prompt is given. Try slagen generate "a red circle moving right".')
    if text == "-":
        text = sys.stdin.read()
    return text.strip()


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from "832x480" or "832*480", None twice from None. Raises UsageError."""
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX*×]\s*(\d{1,5})\s*", text)
    if match is None:
        raise UsageError(f"size is {text!r}, but must be width x height in pixels. Try --size 832x480.")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code; every expected failure is one message."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code. Typer shows wrong usage itself."""
    from slagen import console

    try:
        app(arguments, prog_name="slagen")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        if code == INTERRUPTED:
            console.show_error("interrupted; finished files stay, and no half file has a final name.")
        return code
    except SlagenError as error:
        _debug()
        console.show_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        _debug()
        console.show_error(f"{type(error).__name__}: {error} (a bug in slagen; SLAGEN_DEBUG=1 shows where)")
        return 1
    return 0


def _debug() -> None:
    if os.environ.get("SLAGEN_DEBUG") == "1":
        traceback.print_exc()
