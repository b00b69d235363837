"""The command `tune`."""

from typing import Annotated, Any

import typer

from slagen.attention import registry
from slagen.cli.options import Fields, takes
from slagen.cli.startup import check_docstrings
from slagen.generation.config import OF_VIDEOS, OUTPUT, GenerateConfig
from slagen.tuning.config import TUNABLE, TuneConfig

OF_OTHERS = tuple(  # options of methods that have no sparsity
    each.field for each in registry.own_settings(GenerateConfig) if not {*registry.with_option(each.field)} & {*TUNABLE}
)
LEFT_OUT = (
    "fps",
    "vae",
    "vae_tiling",
    "vae_dtype",
    "offload",
    "output",
    "sparsity_schedule",
    "cache_dir",
    *OF_VIDEOS,
    *OF_OTHERS,
)


@takes(
    settings=TuneConfig,
    video=Fields(
        GenerateConfig, without=LEFT_OUT, help={"seed": "Seed of the first prompt; it increases by 1. Default: 0."}
    ),
)
def tune(
    *,
    video: dict[str, Any],
    settings: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Find a sparsity for each layer that keeps the error to dense attention under a bound, at the least cost.

    Example: slagen tune --attention mean --max-error 0.2 --output schedule.json
    """
    config = TuneConfig(GenerateConfig(prompt="-", timing="off", **video), **settings)
    from slagen.cli.output.tune import show_tuned
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import preflight
    from slagen.generation.prompts import read_prompts

    preflight.check_model(config.base.model, config.base.weights)
    preflight.check_steps(config.base)
    for file in (config.prompts, config.held_out):
        if file is not None:
            read_prompts(file)
    with GenerateProgress() as progress:
        check_docstrings()  # torchmetrics imports what start_quickly leaves out
        from slagen.tuning import run as task

        result = task.tune(config, progress)
    show_tuned(result, as_json)
