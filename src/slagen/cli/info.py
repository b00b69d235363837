"""The commands that report and make nothing: `plan`, `models`, `methods` and `info`."""

from typing import Annotated, Any

import typer

from slagen.cli.generate import read_prompt
from slagen.cli.options import Fields, takes
from slagen.errors import MissingPath
from slagen.generation.config import OUTPUT, VIDEO, GenerateConfig
from slagen.io.paths import user_path

PLANNED = Fields(
    GenerateConfig,
    help={
        "model": "A preset (slagen models lists them) or a folder. Default: turbowan2.1-t2v-1.3b-480p with --device "
        "cuda, otherwise tiny-wan (bundled).",
        "weights": "SLA weights, or a whole transformer in any public format. Default: the model's own.",
        "seed": "Seed, shown in the file name.", "num_videos": "Number of videos.",
        "guidance_scale": "Classifier-free guidance scale; a value above 1 doubles the forward passes.",
    },
)  # fmt: skip


@takes(settings=PLANNED)
def plan(
    *,
    settings: dict[str, Any],
    words: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt, used only for the file name.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The prompt, if not given as an argument.", rich_help_panel=VIDEO),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Estimate the tokens, blocks, FLOPs, memory and downloads of a run, without downloading anything.

    Example: slagen plan --model wan2.1-t2v-1.3b --size 832x480 --num-frames 81 --sparsity 0.95
    """
    given = words is not None or prompt is not None
    config = GenerateConfig(prompt=read_prompt(words, prompt) if given else "prompt", **settings)
    from slagen.cli.output.plan import show_plan
    from slagen.generation import estimate as planning

    show_plan(planning.plan(config), as_json)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
) -> None:
    """List the presets: the source of their weights, and the settings that they are made for.

    Example: slagen models
    """
    from slagen.cli.output.weights import show_models
    from slagen.generation import estimate as planning

    show_models(planning.models(), as_json)


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
) -> None:
    """List the attention methods: what each does, what it needs, and its options with their defaults.

    Example: slagen methods
    """
    from slagen.attention import registry
    from slagen.cli.output.weights import show_methods

    show_methods(registry.describe(), as_json)


def info(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A weight file or folder, saved latents, a video, its .json report, or tiny-wan, the bundled model.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Inspect a checkpoint or saved latents, or show how a generated video was made.

    Example: slagen info TurboWan2.1-T2V-1.3B-480P.pth
    """
    from slagen.cli.output.weights import show_info
    from slagen.cli.progress import say_loading
    from slagen.formats import headers
    from slagen.generation import latents, provenance
    from slagen.io.reading import no_file
    from slagen.wan.folder import BUNDLED, bundled_folder
    from slagen.wan.presets import PRESETS

    place = user_path(path)
    if path == BUNDLED and not place.exists():
        place = bundled_folder()
    about: Any = provenance.describe(place) or latents.describe_latents(place)
    if about is None and not place.exists():
        if path in PRESETS:
            raise MissingPath(
                f"{path} is a preset. See slagen models for its settings, or give a file or folder of weights."
            )
        raise no_file(place, "Give a weight file, a model folder, a video or its .json report.")
    if about is None:
        headers.check_weights(place, shard=True)
        say_loading()
        from slagen.wan import info as task

        about = task.info(str(place))
    show_info(about, as_json)
    timed = provenance.timed_report(about) if isinstance(about, provenance.Made) else None
    if timed is not None and not as_json:
        from slagen.cli.output.generate import write_report

        write_report(timed)
