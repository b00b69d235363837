"""The command `compare`."""

from typing import Annotated, Any

import typer

from slagen.cli.generate import read_prompt
from slagen.cli.options import Fields, takes
from slagen.cli.startup import check_docstrings
from slagen.comparison.config import TAKEN, CompareConfig, read_fractions
from slagen.errors import GateError, UsageError
from slagen.generation.config import ATTENTION, OF_VIDEOS, OUTPUT, GenerateConfig
from slagen.io.paths import user_path
from slagen.io.text import quote_path
from slagen.settings import without_complement

# Of all methods: the command line has no option for it, or another.
OTHERWISE = (
    *TAKEN,
    "attention",
    "sparsity",
    "sla_topk",
    "allow_untrained",
    "vae_tiling",
    "vae_dtype",
    "offload",
    *OF_VIDEOS,
)


@takes(settings=CompareConfig, video=Fields(GenerateConfig, without=OTHERWISE), how=Fields(GenerateConfig, only=TAKEN))
def compare(
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What the video shows, or two .json reports.", show_default=False),
    ] = None,
    video: dict[str, Any],
    settings: dict[str, Any],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Fraction of key blocks with exact attention, 1 - sparsity.", rich_help_panel=ATTENTION, metavar="LIST"
        ),
    ] = None,
    how: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Run attention methods on the same prompt, seed and noise, and show the clips side by side with times and errors.

    Example: slagen compare "a red circle moving right" --methods dense,sla,sol --seed 7
    """
    from slagen.cli.output.compare import show_comparison, show_reports

    if len(words or []) == 2 and all(word.lower().endswith(".json") for word in words or []):
        from slagen.comparison.reports import compare_reports

        show_reports(compare_reports(*(user_path(word) for word in words or [])), as_json)
        return
    config = _config(words or [], settings, keep, video, how)
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import preflight
    from slagen.generation.prompts import read_prompts

    preflight.check_model(config.base.model, config.base.weights, config.base.vae)
    if config.prompts is not None:
        read_prompts(config.prompts)
    for row in config.rows:
        preflight.check_steps(row)
    with GenerateProgress() as progress:
        check_docstrings()  # torchmetrics imports what start_quickly leaves out
        from slagen.comparison import run as task

        result = task.compare(config, progress)
    show_comparison(result, as_json)
    if config.max_error is not None and (above := result.above(config.max_error)):
        found = ", ".join(f"{row.label} {row.mean('velocity_error'):.3g}" for row in above)
        raise GateError(f"the velocity error is above --max-error {config.max_error:g}: {found}.")


def _config(
    words: list[str], settings: dict[str, Any], keep: str | None, video: dict[str, Any], how: dict[str, Any]
) -> CompareConfig:
    """Raises UsageError for words that are no prompt, and for what does not go together."""
    if len(words) == 1 and words[0].lower().endswith(".json"):
        raise UsageError(f"{quote_path(words[0])} is a single report. Give two .json reports, or a prompt in quotes.")
    if len(words) > 1:
        raise UsageError(f"{len(words)} prompts are given. Give one in quotes, two .json reports, or --prompts FILE.")
    if words and settings["prompts"] is not None:
        raise UsageError("both a prompt and --prompts are given. Give one of them.")
    if keep is not None:
        given = {"keep": list(read_fractions(keep, "keep")), "sparsities": list(settings.get("sparsities", ()))}
        settings["sparsities"] = tuple(without_complement(given, "keep", "sparsities")["sparsities"])
    text = "-" if settings["prompts"] is not None else read_prompt(words[0] if words else None, None)
    return CompareConfig(GenerateConfig(prompt=text, attention="dense", **video), attention=how, **settings)
