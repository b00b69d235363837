"""The `slagen` command: its name, its own options, and the list of its commands."""

from collections.abc import Callable
from typing import Annotated

import typer

from slagen import __version__
from slagen.cli import batch, bench, compare, convert, doctor, finetune, generate, info, maps, tune
from slagen.cli.config_file import takes_config
from slagen.cli.parsing import CONTEXT, Command, Group

app = typer.Typer(
    name="slagen",
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    rich_markup_mode=None,
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
    """Generate video with Wan2.1 and sparse-linear attention (SLA), and report where the time goes.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 part of a batch failed, 4 environment (no GPU, package, driver
    or hub), 5 weights, data sets or videos that are corrupt or do not fit, 6 a check failed, 130 interrupted.
    SLAGEN_DEBUG=1 adds the traceback.
    """


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate.generate,
    "batch": batch.batch,
    "plan": info.plan,
    "models": info.models,
    "methods": info.methods,
    "info": info.info,
    "decode": generate.decode_latents,
    "replay": generate.replay,
    "report": generate.report,
    "convert": convert.convert,
    "merge": convert.merge,
    "compare": compare.compare,
    "attention": maps.attention,
    "tune": tune.tune,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}
for name, function in COMMANDS.items():
    shows_help = name in ("generate", "batch")  # without any argument
    app.command(name, cls=Command, no_args_is_help=shows_help, context_settings=CONTEXT)(takes_config(function))
app.add_typer(finetune.tuning)
