"""The command `batch`: a video of every prompt in a file."""

import os
from typing import Annotated, Any

import typer

from slagen.batch.config import BatchConfig
from slagen.cli.options import Fields, takes
from slagen.cli.startup import start_quickly
from slagen.errors import Interrupted
from slagen.generation.config import GenerateConfig

PARTLY_FAILED = 3  # the exit code where some videos of a batch failed


@takes(
    sharing=BatchConfig,
    settings=Fields(
        GenerateConfig,
        without=("num_videos", "overwrite", "trace", "preview", "cfg_parallel", "cache_dir", "no_cache"),
        help={"output": "The folder for the videos."},
    ),
)
def batch(
    context: typer.Context,
    *,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A .txt, .jsonl, .csv, .tsv or .yaml file of prompts, or - to read text from stdin."
        ),
    ],
    sharing: dict[str, Any],
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Distribute the work with Ray, on the cluster at RAY_ADDRESS if that is set, "
            "otherwise on this machine.",
        ),
    ] = False,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Generate a video for every prompt in a file; run the same command again to resume.

    Each line is a prompt, with its own options after it: a red circle --seed 7 --size 128x128 --steps 8 --id circle

    Example: slagen batch prompts.txt --output outputs
    """
    if ray and sharing["ray_address"] is None:
        sharing["ray_address"] = os.environ.get("RAY_ADDRESS") or "local"
    config = BatchConfig(prompts, GenerateConfig(prompt="-", **settings), **sharing)
    run_batch(context, config, as_json)


def run_batch(context: typer.Context, config: BatchConfig, as_json: bool) -> None:
    from slagen.batch import preflight
    from slagen.cli.output.batch import show_batch
    from slagen.cli.progress import GenerateProgress

    requests = preflight.read_batch(config)
    with GenerateProgress() as progress:
        if config.ray_address is None:
            base = config.generate
            start_quickly(context, base.weights, all_of_torch=base.live_lora or base.compile)
            from slagen.batch.run import batch as task
        else:
            from slagen.batch.ray_workers import batch_on_ray as task

        result = task(config, progress, requests)
    show_batch(result, as_json)
    if result.interrupted:
        raise Interrupted(f"interrupted. {result.kept_so_far}")
    if result.failed:
        raise typer.Exit(PARTLY_FAILED)
