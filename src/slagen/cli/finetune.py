"""The commands `finetune` and `finetune data`."""

from typing import Annotated, Any

import typer

from slagen.cli.config_file import takes_config
from slagen.cli.options import Fields, takes
from slagen.cli.parsing import CONTEXT, Command, Group
from slagen.errors import UsageError
from slagen.generation.config import CACHE, OUTPUT, GenerateConfig
from slagen.io.paths import check_folder, user_path
from slagen.training.config import DataConfig, FinetuneConfig

tuning = typer.Typer(name="finetune", cls=Group, no_args_is_help=True, context_settings=CONTEXT, rich_markup_mode=None)


@tuning.callback(invoke_without_command=True)
@takes_config
@takes(clips=DataConfig, settings=FinetuneConfig)
def finetune(
    context: typer.Context,
    *,
    clips: dict[str, Any],
    settings: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Fine-tune a Wan model with sparse-linear attention; run the same command again to resume.

    Example: slagen finetune --model tiny-wan --from-dense --self-generate prompts.txt --sparsity 0.95 --steps 60
    """
    if context.invoked_subcommand is not None:
        sources = {p.opts[0]: context.get_parameter_source(p.name) for p in context.command.params if p.name}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given:
            options = ", ".join(given)
            raise UsageError(
                f"options before {context.invoked_subcommand} have no effect: {options}. Put the options of "
                f"{context.invoked_subcommand} after its name. See slagen finetune {context.invoked_subcommand} --help."
            )
        return
    config = FinetuneConfig(DataConfig(**clips), **settings)
    from slagen.cli.output.finetune import show_finetune
    from slagen.cli.progress import GenerateProgress
    from slagen.training import preflight

    preflight.check_training(config)
    with GenerateProgress() as progress:
        from slagen.training import finetune as task

        result = task.finetune(config, progress)
    if result.rank == 0:
        show_finetune(result, as_json)


@tuning.command("data", cls=Command, context_settings=CONTEXT)
@takes_config
@takes(
    clips=Fields(DataConfig, only=("held_out", "width", "height", "num_frames", "fps", "no_upscale")),
    settings=Fields(FinetuneConfig, only=("model", "seed", "dtype", "device")),
)
def finetune_data(
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder of videos with a .txt beside each, or a .csv, .json or .jsonl with the keys video and "
            "prompt (DiffSynth), file_name and text (Hugging Face), video_path and caption (musubi) or path and cap "
            "(FastVideo).",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to create.")],
    clips: dict[str, Any],
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Encode videos and captions for finetune --data; clips that are encoded already are kept.

    Example: slagen finetune data videos --output prepared --model wan2.1-t2v-1.3b
    """
    check_folder("output", output)
    config = DataConfig(path, **clips)
    from slagen.cli.output.finetune import show_data
    from slagen.cli.progress import GenerateProgress
    from slagen.generation.preflight import check_model
    from slagen.training import preflight

    preflight.check_data(config)
    check_model(settings["model"])
    with GenerateProgress() as progress:
        from slagen.training.data import prepare
        from slagen.training.setup import default_model

        seed, device = settings.pop("seed"), settings["device"]
        base = GenerateConfig("-", **{**settings, "model": default_model(settings["model"], device)})
        data = prepare.prepare(config, base, user_path(output), user_path(CACHE), seed, progress)
    show_data(data, as_json)
