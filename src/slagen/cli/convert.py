"""The commands that write weights in another form: `convert` and `merge`."""

from typing import Annotated, Literal

import typer

from slagen.io.paths import check_folder, user_path


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A transformer in any public format, or the original VAE.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder to create.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The pipeline folder to copy the text encoder, tokenizer and VAE from.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Data type of the weights: bf16, fp16 or fp32.")
    ] = "bf16",
    part: Annotated[
        str | None, typer.Option(help="The transformer to convert if the file holds several, such as generator_ema.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Convert weights in any public format to a diffusers folder, with SLA weights in sla.safetensors.

    Example: slagen convert TurboWan2.1-T2V-1.3B-480P.pth turbo --model Wan2.1-T2V-1.3B-Diffusers
    """
    from slagen.cli import console, progress
    from slagen.formats import headers

    check_folder("output", output)
    headers.check_weights(user_path(source))
    progress.say_loading()
    from slagen import machine
    from slagen.wan import convert as task

    made = task.convert(
        source, output, base=model, dtype=machine.DTYPES[dtype], overwrite=overwrite, part=part, on_note=console.note
    )
    console.write(str(made))


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The transformer to add the change to.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to create.")],
    diff_base: Annotated[str, typer.Option(help="The transformer before fine-tuning.")],
    diff_target: Annotated[str, typer.Option(help="The transformer after fine-tuning.")],
    weight: Annotated[float, typer.Option(help="Factor to multiply the change by.")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Add the change from fine-tuning to another model: BASE + weight x (DIFF_TARGET - DIFF_BASE).

    Example: slagen merge rcm.pth merged.safetensors --diff-base wan.safetensors --diff-target wan-sla.pth
    """
    from slagen.cli import console, progress
    from slagen.formats import headers

    for path in (base, diff_base, diff_target):
        headers.check_weights(user_path(path))
    progress.say_loading()
    from slagen.formats import merge as task

    made = task.merge(
        base,
        output,
        diff_base=diff_base,
        diff_target=diff_target,
        weight=weight,
        overwrite=overwrite,
        on_note=console.note,
    )
    console.write(str(made))
