"""The command `bench`."""

from typing import Annotated, Any

import typer

from slagen.benchmark.config import BenchConfig
from slagen.cli.options import Fields, takes
from slagen.generation.config import OUTPUT


@takes(settings=Fields(BenchConfig, defaults={"output": "outputs/bench"}))
def bench(
    *,
    settings: dict[str, Any],
    length_sweep: Annotated[
        bool,
        typer.Option(
            "--length-sweep/--no-length-sweep", help="Also time shorter sequences.", rich_help_panel="What to measure"
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Benchmark SLA against dense and other sparse attention on this machine, after checking that each is correct.

    Example: slagen bench --shape 1x12x8192x128 --sparsity 0.95 --output results
    """
    if not length_sweep:
        settings.setdefault("lengths", ())
    config = BenchConfig(**settings)
    from slagen.cli.output.bench import show_bench
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        from slagen.benchmark import run as task

        result = task.bench(config, progress)
    show_bench(result, as_json)
