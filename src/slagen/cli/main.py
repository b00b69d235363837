"""The `slagen` command: parse, build a config, call one function, show its result."""

import dataclasses
import os
import re
import signal
import sys
import traceback
from typing import Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand, TyperGroup

from slagen import __version__
from slagen.batch.config import BatchConfig
from slagen.benchmark.config import BenchConfig
from slagen.cli import streams
from slagen.cli.options import Fields, takes
from slagen.errors import EnvironmentProblem, GateError, UsageError, for_the_command_line
from slagen.generation import peers
from slagen.generation.config import CACHE, OUTPUT, VIDEO, GenerateConfig
from slagen.interrupts import ENDING
from slagen.io.documents import decode
from slagen.io.forms import Fault
from slagen.io.paths import check_folder, is_video, user_path
from slagen.io.text import LONG_DASH, MAX_PROMPT, cut, escaped, quote
from slagen.training.config import DataConfig, FinetuneConfig

PARTLY_FAILED, INTERRUPTED = 3, 130

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"], "max_content_width": 100,
}  # fmt: skip


class _Help:
    """Help in plain text, with the options by panel: rich takes longer to import than all the rest of it.

    Other tools' spellings are put into ours before anything is parsed. And no option takes what Python calls a number
    but no setting is: nan, inf, or more digits than 64 bits hold.
    """

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        takes_value = {
            name: not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for parameter in self.get_params(context)  # type: ignore[attr-defined]
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        args = peers.translate(args, takes_value, _note, is_group=isinstance(self, TyperGroup))
        return cast(list[str], super().parse_args(context, args))  # type: ignore[misc]

    def invoke(self, context: Any) -> Any:
        for parameter in self.params:  # type: ignore[attr-defined]
            value = context.params.get(parameter.name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not -(2**63) <= number < 2**63:  # nan fails here too
                    raise UsageError(
                        f"{parameter.opts[0]} is {cut(str(number), 40)}, which is no number for a setting. "
                        f"See {context.command_path} --help."
                    )
        return super().invoke(context)  # type: ignore[misc]

    def format_options(self, context: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(context):  # type: ignore[attr-defined]
            record = parameter.get_help_record(context)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        if isinstance(self, TyperGroup):
            commands = [self.commands[name] for name in self.list_commands(context)]
            panels["Commands"] = [(c.name or "", (c.help or "").split("\n\n")[0].replace("\n", " ")) for c in commands]
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class _Command(_Help, TyperCommand):
    pass


class _Group(_Help, TyperGroup):
    pass


app = typer.Typer(
    name="slagen",
    cls=_Group,
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
    """Fast video from Wan2.1: sparse-linear attention, and a report of where the time went.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 part of a batch failed, 4 environment (no GPU, package, driver
    or hub), 5 weights, data sets or videos that are broken or do not fit, 6 a gate failed, 130
    interrupted. SLAGEN_DEBUG=1 adds the traceback.
    """


@app.command(cls=_Command, no_args_is_help=True, context_settings=CONTEXT)
@takes(settings=GenerateConfig)
def generate(
    context: typer.Context,
    *,
    words: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What the video shows; - reads it from stdin.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, instead of the argument.", rich_help_panel=VIDEO)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="A file of prompts: the same as slagen batch FILE.", rich_help_panel=VIDEO, metavar="FILE"),
    ] = None,
    settings: dict[str, Any],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the run, as slagen plan does.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make a video of a prompt, and beside it a report of where every step's attention time went.

    Example: slagen generate "a red circle moving right" --seed 7 --output circle.mp4
    """
    if prompts is not None:
        _check_prompts(words, prompt, dry_run, settings["overwrite"])
    text = read_prompt(words, prompt) if prompts is None else "-"
    config = GenerateConfig(prompt=text, **settings)
    from slagen.cli.output.generate import show_videos
    from slagen.cli.output.plan import show_plan
    from slagen.cli.progress import GenerateProgress

    if dry_run:
        from slagen.generation import estimate as planning
        from slagen.machine import pick_device
        from slagen.wan.presets import CUDA_DEFAULT

        device = config.device
        kind = pick_device(device).type if device == "auto" else device.partition(":")[0]  # a plan needs no such device
        if config.model is None:
            config = dataclasses.replace(config, model=CUDA_DEFAULT if kind.startswith("cuda") else None)

        show_plan(planning.plan(config, kind), as_json)
        return
    if prompts is not None:
        _run_batch(context, BatchConfig(prompts, config), as_json)
        return
    with GenerateProgress() as progress:
        _start_quickly(context, config.weights)
        from slagen.generation import generate as task

        result = task.generate(config, progress)
    show_videos(result, as_json)


def _check_prompts(words: str | None, prompt: str | None, dry_run: bool, overwrite: bool) -> None:
    """Raise UsageError for what does not go with --prompts."""
    if words is not None or prompt is not None:
        raise UsageError("both a prompt and --prompts are given. Give one of them.")
    if dry_run:
        raise UsageError("--dry-run plans one video, and --prompts names many. Give one prompt.")
    if overwrite:
        raise UsageError(
            "--prompts makes what is missing and replaces nothing. Leave --overwrite out, or give a new --output."
        )


@app.command(cls=_Command, no_args_is_help=True, context_settings=CONTEXT)
@takes(
    sharing=BatchConfig,
    settings=Fields(GenerateConfig, without=("num_videos", "overwrite"), help={"output": "The folder of the videos."}),
)
def batch(
    context: typer.Context,
    *,
    prompts: Annotated[
        str, typer.Argument(metavar="FILE", help=".txt, .jsonl, .csv, .tsv or .yaml; - reads text from stdin.")
    ],
    sharing: dict[str, Any],
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Share the work on Ray: at RAY_ADDRESS, or started on this machine, where nobody else reaches it.",
        ),
    ] = False,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make a video of every prompt in a file; run it again to go on after anything.

    A line of text is a prompt, and what differs: a red circle --seed 7 --size 128x128 --steps 8 --id circle

    Example: slagen batch prompts.txt --output outputs
    """
    if ray and sharing["ray_address"] is None:
        sharing["ray_address"] = os.environ.get("RAY_ADDRESS") or "local"
    config = BatchConfig(prompts, GenerateConfig(prompt="-", **settings), **sharing)
    _run_batch(context, config, as_json)


def _run_batch(context: typer.Context, config: BatchConfig, as_json: bool) -> None:
    from slagen.cli.output.batch import show_batch
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        if config.ray_address is None:
            _start_quickly(context, config.generate.weights)
            from slagen.batch.run import batch as task
        else:
            from slagen.batch.ray_workers import batch_on_ray as task

        result = task(config, progress)
    show_batch(result, as_json)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(PARTLY_FAILED)


PLANNED = Fields(
    GenerateConfig,
    only=(
        "model", "width", "height", "num_frames", "fps", "num_videos", "steps", "guidance_scale", "seed",
        "attention", "sparsity", "sla_topk", "block_m", "block_n", "weights", "allow_untrained", "output",
    ),
    help={
        "model": "A preset or a folder. Default: tiny-wan.", "weights": "As for generate.", "seed": "For the names.",
        "num_videos": "How many videos.", "guidance_scale": "Weight of the prompt; above 1 doubles the passes.",
    },
)  # fmt: skip


@app.command(cls=_Command, context_settings=CONTEXT)
@takes(settings=PLANNED)
def plan(
    *,
    settings: dict[str, Any],
    words: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the video shows, for its name.", show_default=False)
    ] = "prompt",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Estimate tokens, blocks, FLOPs, memory and downloads of a run, before any file is fetched or read.

    Example: slagen plan --model wan2.1-t2v-1.3b --size 832x480 --num-frames 81 --sparsity 0.95
    """
    config = GenerateConfig(prompt=words, **settings)
    from slagen.cli.output.plan import show_plan
    from slagen.generation import estimate as planning

    show_plan(planning.plan(config), as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
) -> None:
    """List the presets: where their weights come from, and the settings they are made for.

    Example: slagen models
    """
    from slagen.cli.output.weights import show_models
    from slagen.generation import estimate as planning

    show_models(planning.models(), as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
) -> None:
    """List the attention methods: what each does, what it needs, and its options with their defaults.

    Example: slagen methods
    """
    from slagen.attention import registry
    from slagen.cli.output.weights import show_methods

    show_methods(registry.describe(), as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A weight file or folder, a video, or its .json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")] = False,
) -> None:
    """Inspect a checkpoint, and whether its SLA was trained; or a generated video, and how it was made.

    Example: slagen info TurboWan2.1-T2V-1.3B-480P.pth
    """
    from slagen.cli.output.weights import show_info
    from slagen.generation import latents
    from slagen.generation import replay as past
    from slagen.wan import info as task

    place = user_path(path)
    show_info(past.describe(place) or latents.describe_latents(place) or task.info(path), as_json)


@app.command("decode", cls=_Command, context_settings=CONTEXT)
@takes(settings=Fields(GenerateConfig, only=("device", "vae", "local_files_only", "overwrite")))
def decode_latents(
    context: typer.Context,
    *,
    path: Annotated[
        str, typer.Argument(metavar="LATENTS", help="What --save-latents wrote, or was kept where no video could be.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The video. Default: LATENTS with .mp4 at its end.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model it was made with, if it lies elsewhere now.")
    ] = None,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Make the video of saved latents, with the report and the metadata that it would have had; nothing is sampled.

    Example: slagen decode outputs/circle.latents.safetensors --output circle.mp4
    """
    from slagen.cli.output.generate import show_videos
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        _start_quickly(context, None)
        from slagen.generation import decode as task

        result = task.decode(path, output, model=model, on_event=progress, **settings)
    show_videos(result, as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
@takes(settings=Fields(GenerateConfig, only=("vae", "local_files_only")))
def replay(
    context: typer.Context,
    *,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A video that slagen made, or its .json.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Keep the new video here.", metavar="FILE")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model it was made with, if it lies elsewhere now.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="The weights, if they lie elsewhere now.", metavar="FILE_OR_FOLDER"),
    ] = None,
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> None:
    """Make a video again and compare latents, frames and file; exit code 6 where they differ.

    Example: slagen replay outputs/0001-a-red-circle-moving-right-s7-12345678.json
    """
    if output is not None and not is_video(output):
        raise UsageError(f"output is {quote(output)}, but must be a file that ends in .mp4.")
    from slagen.cli.output.generate import show_replay
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        _start_quickly(context, "*.gguf")  # it may be
        from slagen.generation import replay as task

        result = task.replay(path, output, progress, model=model, weights=weights, **settings)
    show_replay(result, as_json)
    if not result["same"]:
        raise GateError("the video is not the same. What differs is above.")


@app.command(cls=_Command, context_settings=CONTEXT)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A transformer in any public form, or the original VAE.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The folder of the pipeline it belongs to, whose text encoder, tokenizer and VAE are taken along.",
        ),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    part: Annotated[
        str | None, typer.Option(help="Which transformer, of a file that holds several, such as generator_ema.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
) -> None:
    """Write weights of any public form as a diffusers folder with sla.safetensors beside its transformer.

    Example: slagen convert TurboWan2.1-T2V-1.3B-480P.pth turbo --model Wan2.1-T2V-1.3B-Diffusers
    """
    from slagen import machine
    from slagen.cli import console
    from slagen.wan import convert as task

    made = task.convert(
        source, output, base=model, dtype=machine.DTYPES[dtype], overwrite=overwrite, part=part, on_note=console.note
    )
    console.write(str(made))


@app.command(cls=_Command, context_settings=CONTEXT)
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The transformer that gets the change.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A .safetensors file to make.")],
    diff_base: Annotated[str, typer.Option(help="The transformer before tuning.")],
    diff_target: Annotated[str, typer.Option(help="The transformer after tuning.")],
    weight: Annotated[float, typer.Option(help="How much of the change is added.")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Add what a tuning changed to another model: BASE + weight x (DIFF_TARGET - DIFF_BASE).

    Example: slagen merge rcm.pth merged.safetensors --diff-base wan.safetensors --diff-target wan-sla.pth
    """
    from slagen.cli import console
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


tuning = typer.Typer(name="finetune", cls=_Group, no_args_is_help=True, context_settings=CONTEXT, rich_markup_mode=None)
app.add_typer(tuning)


@tuning.callback(invoke_without_command=True)
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
                f"{options} before {context.invoked_subcommand} has no effect there. Put what it takes behind it: "
                f"slagen finetune {context.invoked_subcommand} --help."
            )
        return
    config = FinetuneConfig(DataConfig(**clips), **settings)
    from slagen.cli.output.finetune import show_finetune
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        from slagen.training import finetune as task

        result = task.finetune(config, progress)
    if result.rank == 0:
        show_finetune(result, as_json)


@tuning.command("data", cls=_Command, context_settings=CONTEXT)
@takes(
    clips=Fields(DataConfig, only=("held_out", "width", "height", "num_frames", "fps")),
    settings=Fields(FinetuneConfig, only=("model", "seed", "dtype", "device")),
)
def finetune_data(
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Videos with a .txt beside each; or a .csv, .json or .jsonl with the keys video and prompt "
            "(DiffSynth), file_name and text (Hugging Face), video_path and caption (musubi) or path and cap "
            "(FastVideo).",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to make.")],
    clips: dict[str, Any],
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Encode videos and captions for finetune --data, once; what is there already is kept.

    Example: slagen finetune data videos --output prepared --model wan2.1-t2v-1.3b
    """
    check_folder("output", output)
    config = DataConfig(path, **clips)
    from slagen.cli.output.finetune import show_data
    from slagen.cli.progress import GenerateProgress

    with GenerateProgress() as progress:
        from slagen.training.data import prepare
        from slagen.training.setup import default_model

        seed, device = settings.pop("seed"), settings["device"]
        base = GenerateConfig("-", **{**settings, "model": default_model(settings["model"], device)})
        data = prepare.prepare(config, base, user_path(output), user_path(CACHE), seed, progress)
    show_data(data, as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
@takes(settings=Fields(BenchConfig, defaults={"output": "outputs/bench"}))
def bench(
    *,
    settings: dict[str, Any],
    length_sweep: Annotated[
        bool,
        typer.Option(
            "--length-sweep/--no-length-sweep", help="Time shorter sequences too.", rich_help_panel="What to measure"
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Time SLA against dense attention and other sparse attention on this machine; what is wrong is not timed.

    Example: slagen bench --shape 1x12x8192x128 --sparsity 0.95 --output results
    """
    if not length_sweep:
        settings.setdefault("lengths", ())
    config = BenchConfig(**settings)
    from slagen.benchmark import run as task
    from slagen.cli import console
    from slagen.cli.output.bench import show_bench

    result = task.bench(config, console.note)
    show_bench(result, as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile every kernel for every card: shared memory, registers, spills, instructions, copies in "
            "flight, and an estimate of the operator's time.",
        ),
    ] = False,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Try kernels, a video of the bundled model and a short bench, in under five minutes on a card, and "
            "write one JSON file to attach to an issue. Exits with code 6 where a check fails, and with code 4 where "
            "this machine lacks what one takes.",
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(help="The file of --selftest. [default: slagen-selftest-<date>.json]", show_default=False),
    ] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Exit with code 4 where there is no usable GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Say what this machine can do, and how to fix what it cannot.

    Example: slagen doctor --selftest
    """
    from slagen.cli import console
    from slagen.cli.output.doctor import show_findings, show_selftest
    from slagen.cli.output.kernels import show_kernels
    from slagen.doctor import checks as task

    if kernels and selftest:
        raise UsageError("--kernels and --selftest are two things. Give one of them.")
    if output is not None and not selftest:
        raise UsageError("--output is the file of --selftest, which is not given.")
    if selftest:
        from slagen.doctor import selftest as trials

        path = trials.claim(output)
        content = trials.selftest(console.note)
        trials.write(content, path)
        show_selftest(content, path, as_json)
        trials.check(content)
        return
    if kernels:
        content = task.kernel_costs(console.note)
        show_kernels(content, as_json)
        task.check_kernels(content)
        return
    findings = task.examine()
    show_findings(findings, as_json)
    if require_gpu:
        task.check_gpu(findings)


def _start_quickly(context: typer.Context, weights: str | None) -> None:
    """Where the process ends with this command, import no package that it does not use.

    Raises: EnvironmentProblem where Python has no docstrings, of which diffusers prints pages before it fails.
    """
    if sys.flags.optimize > 1:
        from slagen.cli.usage import WITHOUT_DOCSTRINGS

        raise EnvironmentProblem(WITHOUT_DOCSTRINGS)
    if context.obj["own_process"]:
        from slagen.wan.startup import leave_out

        leave_out(keep=("gguf",) if weights is not None and weights.endswith(".gguf") else ())


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code; every expected failure is one message."""
    for number in ENDING:  # end as Ctrl-C does: part files go, the code is 130
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, signal.default_int_handler)
    if arguments is not None:
        sys.exit(run(arguments))
    streams.mend()
    try:
        os.getcwd()
    except OSError as error:  # MKL and others end the process over it
        _show_error(f"the current folder is not there any more ({error.strerror}). Go to another: cd ~")
        sys.exit(UsageError.exit_code)
    code = run(sys.argv[1:], own_process=True)
    sys.stdout.flush()
    sys.exit(code)


def run(arguments: list[str], *, own_process: bool = False) -> int:
    """Run the command and return its exit code; what is wrong is said in one message.

    Args:
        own_process: the process ends with the command, so that nothing need be imported that it does not use.
    """
    with for_the_command_line():
        return _run(arguments, own_process)


def _run(arguments: list[str], own_process: bool) -> int:
    try:
        code = app(arguments, prog_name="slagen", obj={"own_process": own_process}, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from slagen.cli import usage

        _debug()
        text, code = usage.explain(error, arguments)
        if text.startswith("Usage: "):
            typer.echo(text, err=True)
        else:
            _show_error(text)
    if code == INTERRUPTED:
        _show_error("interrupted; finished files stay, and no half file has a final name.")
    return code if isinstance(code, int) else 0


def _note(text: str) -> None:
    from slagen.cli import console

    console.note(text)


def _show_error(text: str) -> None:
    from slagen.cli import console

    console.show_error(text)


def _debug() -> None:
    if os.environ.get("SLAGEN_DEBUG") == "1":
        sys.stderr.write(escaped(traceback.format_exc()))
