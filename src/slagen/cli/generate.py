"""The commands that make one video: `generate`, `decode` and `replay`."""

import dataclasses
import re
import sys
from typing import Annotated, Any

import typer

from slagen.batch.config import BatchConfig
from slagen.cli.batch import run_batch
from slagen.cli.options import Fields, takes
from slagen.cli.startup import start_quickly
from slagen.errors import GateError, UsageError
from slagen.generation.config import CACHE, OUTPUT, VIDEO, GenerateConfig
from slagen.io.documents import decode
from slagen.io.forms import Fault
from slagen.io.paths import check_video, user_path
from slagen.io.text import LONG_DASH, MAX_PROMPT, quote_path

AGAIN = "The report (.json) of a video, or the video: generate it again, changed as other options say."


@takes(settings=GenerateConfig)
def generate(
    context: typer.Context,
    *,
    words: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the video shows, or - to read it from stdin.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The prompt, if not given as an argument.", rich_help_panel=VIDEO),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="A file of prompts, as for slagen batch.", rich_help_panel=VIDEO, metavar="FILE"),
    ] = None,
    from_report: Annotated[
        str | None, typer.Option("--from", help=AGAIN, rich_help_panel=VIDEO, metavar="REPORT")
    ] = None,
    settings: dict[str, Any],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate the run, as slagen plan does.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the times of each step, and all totals.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Generate a video from a prompt, and a JSON report of each step's attention time.

    Example: slagen generate "a red circle moving right" --seed 7 --output circle.mp4
    """
    if verbose and (prompts is not None or dry_run):
        raise UsageError("--verbose prints the steps of a single video. Leave it out.")
    if prompts is not None:
        _check_prompts(words, prompt, dry_run, settings["overwrite"], from_report)
        settings["prompt"] = "-"
    elif from_report is None or words is not None or prompt is not None:
        settings["prompt"] = read_prompt(words, prompt)
    config = GenerateConfig(**settings) if from_report is None else _config_again(context, from_report, settings)
    from slagen.cli.output.generate import show_videos
    from slagen.cli.output.plan import show_plan
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import preflight

    preflight.check_processes(config, "--prompts" if prompts is not None else "--dry-run" if dry_run else "")
    if prompts is not None:
        run_batch(context, _as_batch(prompts, config), as_json)
        return
    preflight.check_run(config)
    if dry_run:
        show_plan(_estimated(config), as_json)
        return
    with GenerateProgress() as progress:
        start_quickly(context, config.weights, all_of_torch=config.live_lora or config.compile)
        from slagen.generation import generate as task

        result = task.generate(config, progress)
    show_videos(result, as_json, verbose)


def _as_batch(prompts: str, config: GenerateConfig) -> BatchConfig:
    return BatchConfig(prompts, config, cache_dir=config.cache_dir or CACHE, no_cache=config.no_cache)


def _typed(context: typer.Context) -> set[str]:
    """The names of the options that were given, on the command line or in a file."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    names = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return names | ({"prompt"} if "words" in names else set())


def _config_again(context: typer.Context, report: str, settings: dict[str, Any]) -> GenerateConfig:
    """What made a video, with what the command line says otherwise."""
    from slagen.generation.recorded import changed_again, reproducible

    fields = changed_again(report, settings, _typed(context))
    with reproducible(user_path(report)):
        return GenerateConfig(**fields)


def _estimated(config: GenerateConfig) -> Any:
    """What --dry-run shows."""
    from slagen.generation import estimate as planning
    from slagen.machine import pick_device
    from slagen.wan.presets import CUDA_DEFAULT

    device = config.device
    kind = pick_device(device).type if device == "auto" else device.partition(":")[0]  # a plan needs no such device
    if config.model is None:
        config = dataclasses.replace(config, model=CUDA_DEFAULT if kind.startswith("cuda") else None)
    return planning.plan(config, kind)


def _check_prompts(
    words: str | None, prompt: str | None, dry_run: bool, overwrite: bool, from_report: str | None
) -> None:
    """Raise UsageError for what does not go with --prompts."""
    if from_report is not None:
        raise UsageError("--from makes one video, but --prompts gives many. Leave one of them out.")
    if words is not None or prompt is not None:
        raise UsageError("both a prompt and --prompts are given. Give one of them.")
    if dry_run:
        raise UsageError("--dry-run estimates one video, but --prompts gives many. Give one prompt.")
    if overwrite:
        raise UsageError(
            "--prompts generates only missing videos, so --overwrite has no effect. Leave --overwrite out, or give a "
            "new --output."
        )


def read_prompt(words: str | None, option: str | None) -> str:
    """The prompt from the argument, the option or stdin. Raises UsageError if two or none are given."""
    if words is not None and option is not None:
        raise UsageError("the prompt is given twice, as an argument and with --prompt. Give one of them.")
    text = words if words is not None else option
    if text is None:
        raise UsageError('no prompt is given. Try slagen generate "a red circle moving right".')
    if text == "-":
        try:
            text = decode(read_stdin(8 * MAX_PROMPT))  # more is too long in any script
        except Fault as fault:
            raise UsageError(f"stdin{fault.place}: {fault}. Give the prompt as plain UTF-8 text.") from None
    elif re.match(LONG_DASH, text):
        from slagen.generation.prompts import check_dashes

        check_dashes(text[:80])
    return text.strip()


def read_stdin(most: int) -> bytes:
    """At most so many bytes of stdin. Raises UsageError where it is closed."""
    if sys.stdin is None:
        raise UsageError("stdin is closed. Give the prompt as an argument.")
    stream = getattr(sys.stdin, "buffer", None)
    return stream.read(most) if stream is not None else sys.stdin.read(most).encode("utf-8", "surrogatepass")


@takes(settings=Fields(GenerateConfig, only=("device", "vae", "local_files_only", "overwrite", "crf", "no_metadata")))
def decode_latents(
    context: typer.Context,
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="LATENTS", help="Latents from --save-latents, or from a run whose video could not be written."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The video to write, .mp4, .webm, .gif or .frames. Default: the name of LATENTS, ending in .mp4.",
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model that generated the latents, if it has moved.")
    ] = None,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Decode saved latents to a video with its report and metadata, without sampling.

    Example: slagen decode outputs/circle.latents.safetensors --output circle.mp4
    """
    from slagen.cli.output.generate import show_videos
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import latents, preflight

    check_video(output)
    latents.read_about(user_path(path))
    preflight.check_model(model, vae=settings["vae"], image=None)
    with GenerateProgress() as progress:
        start_quickly(context, None)
        from slagen.generation import decode as task

        result = task.decode(path, output, model=model, on_event=progress, **settings)
    show_videos(result, as_json)


@takes(settings=Fields(GenerateConfig, only=("overwrite",)))
def report(
    *,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="REPORT...", help="Reports of videos (.json), or the videos beside them."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file to write. Default: the path of the first report, with .html in place of .json.",
            metavar="FILE",
        ),
    ] = None,
    settings: dict[str, Any],
) -> None:
    """Write reports as one HTML page that needs no network: the video, and where each step's time went.

    Example: slagen report outputs/dense.json outputs/sla.json --output both.html
    """
    from slagen.cli.console import write
    from slagen.generation import pages

    if output is not None and not output.lower().endswith((".html", ".htm")):
        raise UsageError(f"output is {quote_path(output)}, but must be a file that ends in .html.")
    page = None if output is None else user_path(output)
    write(str(pages.write_page(tuple(paths), page, settings["overwrite"])))


@takes(settings=Fields(GenerateConfig, only=("vae", "local_files_only")))
def replay(
    context: typer.Context,
    *,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A video that slagen generated, or its .json report.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Save the new video to this file.", metavar="FILE")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model that generated the video, if it has moved.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The weights that generated the video, if they are in a different place now.", metavar="FILE_OR_FOLDER"
        ),
    ] = None,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> None:
    """Generate a video again and compare latents, frames and file; exit code 6 if they differ.

    Example: slagen replay outputs/0001-a-red-circle-moving-right-s7-12345678.json
    """
    check_video(output)
    from slagen.cli.output.generate import show_replay
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import preflight, provenance

    all_of_torch = provenance.needed_all_of_torch(user_path(path))
    preflight.check_model(model, weights, settings["vae"], image=None)
    with GenerateProgress() as progress:
        start_quickly(context, "*.gguf", all_of_torch=all_of_torch)  # it may be
        from slagen.generation import replay as task

        result = task.replay(path, output, progress, model=model, weights=weights, **settings)
    show_replay(result, as_json)
    if not result.same:
        raise GateError("the new video differs from the old one. The table shows where.")
