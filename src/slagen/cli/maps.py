"""The command `attention`."""

from typing import Annotated, Any

import typer

from slagen.cli.generate import read_prompt
from slagen.cli.options import Fields, takes
from slagen.cli.startup import start_quickly
from slagen.generation.config import OF_VIDEOS, OUTPUT, GenerateConfig
from slagen.maps.config import MapConfig

LEFT_OUT = ("fps", "vae", "vae_tiling", "vae_dtype", "offload", "output", *OF_VIDEOS)


@takes(settings=Fields(GenerateConfig, without=LEFT_OUT), where=MapConfig)
def attention(
    context: typer.Context,
    *,
    words: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the video shows, or - to read it from stdin.", show_default=False),
    ] = None,
    where: dict[str, Any],
    settings: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Draw which key blocks a head attends to, and how much of the softmax they hold.

    Example: slagen attention "a red circle moving right" --layer 3 --step 8 --head 1
    """
    base = GenerateConfig(prompt=read_prompt(words, None), timing="off", **settings)
    config = MapConfig(base, **where)
    from slagen.cli.output.maps import show_map
    from slagen.cli.progress import GenerateProgress
    from slagen.generation import preflight

    preflight.check_model(base.model, base.weights, base.vae)
    preflight.check_steps(base)
    with GenerateProgress() as progress:
        start_quickly(context, base.weights, all_of_torch=base.live_lora)
        from slagen.maps import run as task

        result = task.draw(config, progress)
    show_map(result, as_json)
