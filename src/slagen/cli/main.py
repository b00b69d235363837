"""The `slagen` command: parse, build a config, call one function, show its result."""

import dataclasses
import os
import re
import signal
import sys
import traceback
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from slagen import __version__
from slagen.cli import streams
from slagen.config import (
    CACHE,
    Attention,
    Backend,
    BatchConfig,
    BenchConfig,
    DataConfig,
    Dtype,
    FeatureMap,
    FinetuneConfig,
    GenerateConfig,
    LinearDomain,
    Loss,
    Optimizer,
    Parallel,
    RandomInit,
    Sampler,
    Trained,
    TunedAttention,
)
from slagen.errors import EnvironmentProblem, GateError, UsageError
from slagen.interrupts import ENDING
from slagen.io.documents import decode
from slagen.io.forms import Fault
from slagen.io.paths import check_folder, is_video, user_path
from slagen.io.text import LONG_DASH, MAX_PROMPT, cut, escaped, quote
from slagen.timing import Timing

# Other tools' spellings of our options; they work, and stay out of the help. Underscores count as dashes.
ALIASES = {
    "num-inference-steps": "steps", "sample-steps": "steps", "infer-steps": "steps", "num-steps": "steps",
    "sample-guide-scale": "guidance-scale", "cfg": "guidance-scale",
    "sample-shift": "flow-shift", "shift": "flow-shift",
    "frame-num": "num-frames", "video-length": "num-frames",
    "base-seed": "seed",
    "num-videos-per-prompt": "num-videos", "num-samples": "num-videos",
    "topk": "sla-topk",
    "attention-backend": "attention", "attention-type": "attention", "attn-mode": "attention",
    "model-path": "model", "ckpt-dir": "model",
    "dit-path": "weights", "dit": "weights", "sla-weights": "weights",
    "sample-solver": "sampler", "scheduler": "sampler", "vae-path": "vae",
    "save-file": "output", "save-path": "output", "output-path": "output",
}  # fmt: skip


def normalize(token: str) -> str:
    """An option's name, without its leading dashes, as we spell it: dashes for underscores, our name for another's."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)


PARTLY_FAILED, INTERRUPTED = 3, 130

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"], "token_normalize_func": normalize, "max_content_width": 100,
}  # fmt: skip


class _Help:
    """Help in plain text, with the options by panel: rich takes longer to import than all the rest of it.

    And no option takes what Python calls a number but no setting is: nan, inf, or more digits than 64 bits hold.
    """

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


VIDEO, SAMPLING, ATTENTION, OUTPUT = "Video", "Sampling", "Attention", "Output"


# What `generate` and `batch` share.
NegativePromptOption = Annotated[
    str | None, typer.Option("--negative-prompt", "-n", help="What to steer away from.", rich_help_panel=VIDEO)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        rich_help_panel=VIDEO,
        help="A preset (slagen models lists them), a folder, or a hub id. Default: turbowan2.1-t2v-1.3b-480p with "
        "a CUDA device, tiny-wan (bundled) without.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(help="Width x height in pixels, such as 832x480.", rich_help_panel=VIDEO, metavar="WxH"),
]
NumFramesOption = Annotated[int | None, typer.Option(help="Video frames, 4k + 1.", rich_help_panel=VIDEO)]
FpsOption = Annotated[int | None, typer.Option(help="Frames a second.", rich_help_panel=VIDEO)]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)]
GuidanceScaleOption = Annotated[
    float | None,
    typer.Option(help="Weight of the prompt; 1 skips the unconditional pass.", rich_help_panel=SAMPLING),
]
FlowShiftOption = Annotated[
    float | None, typer.Option(help="Lean of the sampler towards noise.", rich_help_panel=SAMPLING)
]
SamplerOption = Annotated[
    Sampler | None,
    typer.Option(help="unipc, euler, dpm++ or rcm. Default: what the weights are for.", rich_help_panel=SAMPLING),
]
SigmaMaxOption = Annotated[
    float | None, typer.Option(help="First noise level of rcm, 80 unless given.", rich_help_panel=SAMPLING)
]
OdeOption = Annotated[
    bool, typer.Option("--ode", help="Without fresh noise in each step of rcm.", rich_help_panel=SAMPLING)
]
SeedOption = Annotated[
    int | None, typer.Option(help="Same seed, same video. Random (-1) unless given.", rich_help_panel=SAMPLING)
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="auto, bf16, fp16 or fp32. auto: bf16 on CUDA (fp16 where a card lacks it), fp32 on a CPU.",
        rich_help_panel=SAMPLING,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=SAMPLING)]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="sla; sparse or linear: one branch of it, if so trained; dense: the base model with full attention.",
    ),
]
BackendOption = Annotated[
    Backend, typer.Option(help="SLA's implementation: auto, reference, torch or triton.", rich_help_panel=ATTENTION)
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Fraction of key blocks not attended exactly, from 0 to below 1. Default: as trained.",
    ),
]
SlaTopkOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        show_default=False,
        help="The fraction that is, counted as in the published code: int(fraction x blocks).",
    ),
]
BlockMOption = Annotated[
    int | None,
    typer.Option(
        help="Query rows of a block: 16, 32, 64 or 128. Default: as trained.",
        rich_help_panel=ATTENTION,
        show_default=False,
    ),
]
BlockNOption = Annotated[
    int | None,
    typer.Option(help="Key columns of a block. Default: as trained.", rich_help_panel=ATTENTION, show_default=False),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="SLA weights, or a whole transformer in any public form. Default: the model's own.",
        rich_help_panel=ATTENTION,
        metavar="FILE_OR_FOLDER",
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option(help="Another VAE, such as Wan2.1_VAE.pth.", rich_help_panel=VIDEO, metavar="FILE_OR_FOLDER"),
]
LocalFilesOnlyOption = Annotated[
    bool, typer.Option("--local-files-only", help="Download nothing.", rich_help_panel=VIDEO)
]
AllowUntrainedOption = Annotated[
    bool,
    typer.Option("--allow-untrained", help="Run SLA whose weights are missing or zero.", rich_help_panel=ATTENTION),
]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", help="A folder, or a file that ends in .mp4.", rich_help_panel=OUTPUT)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)]
SaveLatentsOption = Annotated[
    bool, typer.Option("--save-latents", help="Also write the final latents.", rich_help_panel=OUTPUT)
]
TimingOption = Annotated[
    Timing, typer.Option(help="layer, step or off: how finely attention is timed.", rich_help_panel=OUTPUT)
]


@app.command(cls=_Command, no_args_is_help=True, context_settings=CONTEXT)
def generate(
    context: typer.Context,
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
    negative_prompt: NegativePromptOption = None,
    model: ModelOption = None,
    size: SizeOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    num_videos: Annotated[int, typer.Option(help="How many videos; seeds count up.", rich_help_panel=VIDEO)] = 1,
    steps: StepsOption = None,
    guidance_scale: GuidanceScaleOption = None,
    flow_shift: FlowShiftOption = None,
    sampler: SamplerOption = None,
    sigma_max: SigmaMaxOption = None,
    ode: OdeOption = False,
    seed: SeedOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    attention: AttentionOption = "sla",
    backend: BackendOption = "auto",
    sparsity: SparsityOption = None,
    sla_topk: SlaTopkOption = None,
    block_m: BlockMOption = None,
    block_n: BlockNOption = None,
    weights: WeightsOption = None,
    vae: VaeOption = None,
    local_files_only: LocalFilesOnlyOption = False,
    allow_untrained: AllowUntrainedOption = False,
    output: OutputOption = "outputs",
    overwrite: OverwriteOption = False,
    save_latents: SaveLatentsOption = False,
    timing: TimingOption = "layer",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, as slagen plan does.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make a video of a prompt, and beside it a report of where every step's attention time went.

    Example: slagen generate "a red circle moving right" --seed 7 --output circle.mp4
    """
    if prompts is not None and (words is not None or prompt is not None):
        raise UsageError("both a prompt and --prompts are given. Give one of them.")
    if prompts is not None and dry_run:
        raise UsageError("--dry-run plans one video, and --prompts names many. Give one prompt.")
    if prompts is not None and overwrite:
        raise UsageError(
            "--prompts makes what is missing and replaces nothing. Leave --overwrite out, or give a new --output."
        )
    width, height = parse_size(size)
    config = GenerateConfig(
        prompt=read_prompt(words, prompt) if prompts is None else "-",
        model=model,
        weights=weights,
        vae=vae,
        local_files_only=local_files_only,
        allow_untrained=allow_untrained,
        attention=attention,
        backend=backend,
        sparsity=sparsity,
        sla_topk=sla_topk,
        block_m=block_m,
        block_n=block_n,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        sampler=sampler,
        sigma_max=sigma_max,
        ode=ode,
        seed=None if seed == -1 else seed,
        num_videos=num_videos,
        dtype=parse_dtype(dtype),
        device=device,
        timing=timing,
        output=output,
        save_latents=save_latents,
        overwrite=overwrite,
    )
    from slagen.cli import console

    if dry_run:
        from slagen.generation import estimate as planning
        from slagen.machine import pick_device
        from slagen.wan.presets import CUDA_DEFAULT

        kind = pick_device(device).type if device == "auto" else device.partition(":")[0]  # a plan needs no such device
        if model is None:
            config = dataclasses.replace(config, model=CUDA_DEFAULT if kind.startswith("cuda") else None)

        console.show_plan(planning.plan(config, kind), as_json)
        return
    if prompts is not None:
        _run_batch(context, BatchConfig(prompts, config), as_json)
        return
    with console.GenerateProgress() as progress:
        _start_quickly(context, weights)
        from slagen.generation import generate as task

        result = task.generate(config, progress)
    console.show_videos(result, as_json)


@app.command(cls=_Command, no_args_is_help=True, context_settings=CONTEXT)
def batch(
    context: typer.Context,
    prompts: Annotated[
        str, typer.Argument(metavar="FILE", help=".txt, .jsonl, .csv, .tsv or .yaml; - reads text from stdin.")
    ],
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="i/n: every n-th job from the i-th on, for n machines.", metavar="I/N")
    ] = None,
    cache_dir: Annotated[str, typer.Option(help="Where prompt embeddings and hashes are kept.")] = CACHE,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no embeddings.")] = False,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Share the work on Ray: at RAY_ADDRESS, or started on this machine, where nobody else reaches it.",
        ),
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="The same on the Ray cluster there; if it wants a token, give that in RAY_AUTH_TOKEN, or its file in "
            "RAY_AUTH_TOKEN_PATH.",
            metavar="HOST:PORT",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(help="Models in memory at once. Default: one a GPU, or one a machine without.")
    ] = None,
    negative_prompt: NegativePromptOption = None,
    model: ModelOption = None,
    size: SizeOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceScaleOption = None,
    flow_shift: FlowShiftOption = None,
    sampler: SamplerOption = None,
    sigma_max: SigmaMaxOption = None,
    ode: OdeOption = False,
    seed: SeedOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    attention: AttentionOption = "sla",
    backend: BackendOption = "auto",
    sparsity: SparsityOption = None,
    sla_topk: SlaTopkOption = None,
    block_m: BlockMOption = None,
    block_n: BlockNOption = None,
    weights: WeightsOption = None,
    vae: VaeOption = None,
    local_files_only: LocalFilesOnlyOption = False,
    allow_untrained: AllowUntrainedOption = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The folder of the videos.", rich_help_panel=OUTPUT)
    ] = "outputs",
    save_latents: SaveLatentsOption = False,
    timing: TimingOption = "layer",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make a video of every prompt in a file; run it again to go on after anything.

    A line of text is a prompt, and what differs: a red circle --seed 7 --size 128x128 --steps 8 --id circle

    Example: slagen batch prompts.txt --output outputs
    """
    width, height = parse_size(size)
    settings = GenerateConfig(
        prompt="-",
        width=width,
        height=height,
        seed=None if seed == -1 else seed,
        dtype=parse_dtype(dtype),
        negative_prompt=negative_prompt,
        model=model,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        flow_shift=flow_shift,
        sampler=sampler,
        sigma_max=sigma_max,
        ode=ode,
        device=device,
        attention=attention,
        backend=backend,
        sparsity=sparsity,
        sla_topk=sla_topk,
        block_m=block_m,
        block_n=block_n,
        weights=weights,
        vae=vae,
        local_files_only=local_files_only,
        allow_untrained=allow_untrained,
        output=output,
        save_latents=save_latents,
        timing=timing,
    )
    if ray and ray_address is None:
        ray_address = os.environ.get("RAY_ADDRESS") or "local"
    config = BatchConfig(
        prompts, settings, retry_failed, parse_shard(shard), cache_dir, no_cache, ray_address, ray_workers
    )  # fmt: skip
    _run_batch(context, config, as_json)


def _run_batch(context: typer.Context, config: BatchConfig, as_json: bool) -> None:
    from slagen.cli import console

    with console.GenerateProgress() as progress:
        if config.ray_address is None:
            _start_quickly(context, config.generate.weights)
            from slagen.batch.run import batch as task
        else:
            from slagen.batch.ray_workers import batch_on_ray as task

        result = task(config, progress)
    console.show_batch(result, as_json)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(PARTLY_FAILED)


@app.command(cls=_Command, context_settings=CONTEXT)
def plan(
    words: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the video shows, for its name.", show_default=False)
    ] = "prompt",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A preset or a folder. Default: tiny-wan.", rich_help_panel=VIDEO),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="As for generate.", rich_help_panel=ATTENTION, metavar="FILE_OR_FOLDER")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Width x height in pixels, such as 832x480.", rich_help_panel=VIDEO, metavar="WxH"),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Video frames, 4k + 1.", rich_help_panel=VIDEO)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.", rich_help_panel=VIDEO)] = None,
    num_videos: Annotated[int, typer.Option(help="How many videos.", rich_help_panel=VIDEO)] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Weight of the prompt; above 1 doubles the passes.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the names.", rich_help_panel=SAMPLING)] = None,
    sparsity: SparsityOption = None,
    sla_topk: SlaTopkOption = None,
    block_m: BlockMOption = None,
    block_n: BlockNOption = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A folder, or a file that ends in .mp4.", rich_help_panel=OUTPUT)
    ] = "outputs",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Say what a run will be, before any file is fetched or read: tokens, blocks, FLOPs, memory, downloads.

    Example: slagen plan --model wan2.1-t2v-1.3b --size 832x480 --num-frames 81 --sparsity 0.95
    """
    width, height = parse_size(size)
    config = GenerateConfig(
        prompt=words,
        model=model,
        weights=weights,
        sparsity=sparsity,
        sla_topk=sla_topk,
        block_m=block_m,
        block_n=block_n,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=None if seed == -1 else seed,
        num_videos=num_videos,
        output=output,
    )
    from slagen.cli import console
    from slagen.generation import estimate as planning

    console.show_plan(planning.plan(config), as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
) -> None:
    """List the presets: where their weights come from, and the settings they are made for.

    Example: slagen models
    """
    from slagen.cli import console
    from slagen.generation import estimate as planning

    console.show_models(planning.models(), as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A weight file or folder, a video, or its .json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")] = False,
) -> None:
    """Say what a weight file or folder is, and whether its SLA was trained; or how a video was made.

    Example: slagen info TurboWan2.1-T2V-1.3B-480P.pth
    """
    from slagen.cli import console
    from slagen.generation import replay as past
    from slagen.wan import convert as task

    console.show_info(past.describe(user_path(path)) or task.info(path), as_json)


@app.command("decode", cls=_Command, context_settings=CONTEXT)
def decode_latents(
    context: typer.Context,
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
    vae: VaeOption = None,
    device: DeviceOption = "auto",
    local_files_only: LocalFilesOnlyOption = False,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Make the video of saved latents, with the report and the metadata that it would have had; nothing is sampled.

    Example: slagen decode outputs/circle.latents.safetensors --output circle.mp4
    """
    from slagen.cli import console

    with console.GenerateProgress() as progress:
        _start_quickly(context, None)
        from slagen.generation import decode as task

        result = task.decode(
            path,
            output,
            overwrite=overwrite,
            model=model,
            vae=vae,
            device=device,
            local_files_only=local_files_only,
            on_event=progress,
        )
    console.show_videos(result, as_json)


@app.command(cls=_Command, context_settings=CONTEXT)
def replay(
    context: typer.Context,
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
    vae: VaeOption = None,
    local_files_only: LocalFilesOnlyOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> None:
    """Make a video again and compare latents, frames and file; exit code 6 where they differ.

    Example: slagen replay outputs/0001-a-red-circle-moving-right-s7-12345678.json
    """
    if output is not None and not is_video(output):
        raise UsageError(f"output is {quote(output)}, but must be a file that ends in .mp4.")
    from slagen.cli import console

    with console.GenerateProgress() as progress:
        _start_quickly(context, "*.gguf")  # it may be
        from slagen.generation import replay as task

        result = task.replay(
            path,
            output,
            progress,
            model=model,
            weights=weights,
            vae=vae,
            local_files_only=local_files_only,
        )
    console.show_replay(result, as_json)
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
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    part: Annotated[
        str | None, typer.Option(help="Which transformer, of a file that holds several, such as generator_ema.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
) -> None:
    """Write weights of any public form as a diffusers folder with sla.safetensors beside its transformer.

    Example: slagen convert TurboWan2.1-T2V-1.3B-480P.pth turbo --model Wan2.1-T2V-1.3B-Diffusers
    """
    kind = parse_dtype(dtype)
    if kind == "auto":
        raise UsageError("dtype is 'auto', but a file needs one. Try --dtype bf16.")
    from slagen import machine
    from slagen.cli import console
    from slagen.wan import convert as task

    made = task.convert(
        source, output, base=model, dtype=machine.DTYPES[kind], overwrite=overwrite, part=part, on_note=console.note
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
    from slagen.wan import convert as task

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


DATA, MODEL, TRAINING, MACHINE = "Data", "Model and attention", "Training", "Machine"

tuning = typer.Typer(name="finetune", cls=_Group, no_args_is_help=True, context_settings=CONTEXT, rich_markup_mode=None)
app.add_typer(tuning)

DataSizeOption = Annotated[
    str | None, typer.Option("--size", help="Clips of this area, width x height.", rich_help_panel=DATA, metavar="WxH")
]
DataFramesOption = Annotated[
    int | None, typer.Option("--num-frames", help="The longest clip, 4k + 1.", rich_help_panel=DATA)
]
DataFpsOption = Annotated[int | None, typer.Option("--fps", help="Frames a second of clips.", rich_help_panel=DATA)]
HeldOutOption = Annotated[
    int | None, typer.Option(help="Videos to hold out. Default: a tenth, from 1 to 16.", rich_help_panel=DATA)
]
TuneModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        rich_help_panel=MODEL,
        help="A preset, folder or hub id. Default: wan2.1-t2v-1.3b with a CUDA device, tiny-wan (bundled) without.",
    ),
]
TuneSeedOption = Annotated[
    int, typer.Option("--seed", help="Of noise, order, and which clips are held out.", rich_help_panel=TRAINING)
]
TuneDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="To compute in: auto (bf16 on CUDA that has it, else fp32), bf16 or fp32.",
        rich_help_panel=MACHINE,
    ),
]
TuneDeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=MACHINE)]


@tuning.callback(invoke_without_command=True)
def finetune(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA, metavar="PATH", help="Videos with captions (see finetune data), or prepared."
        ),
    ] = None,
    self_generate: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA, metavar="FILE", help="No videos: a prompt file, of which the dense model makes clips."
        ),
    ] = None,
    clips_per_prompt: Annotated[
        int | None,
        typer.Option(
            help="How many clips of each, unless its line has --num-videos; one more is held out. Default: 4.",
            rich_help_panel=DATA,
        ),
    ] = None,
    held_out: HeldOutOption = None,
    size: DataSizeOption = None,
    num_frames: DataFramesOption = None,
    fps: DataFpsOption = None,
    model: TuneModelOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="SLA weights to go on from, or a transformer.", rich_help_panel=MODEL, metavar="FILE_OR_FOLDER"
        ),
    ] = None,
    from_dense: Annotated[
        bool, typer.Option("--from-dense", help="Begin with dense weights and a fresh proj_l.", rich_help_panel=MODEL)
    ] = False,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Download nothing.", rich_help_panel=MODEL)
    ] = False,
    attention: Annotated[
        TunedAttention,
        typer.Option(help="sla; to compare: sparse or linear, one branch of it, or dense.", rich_help_panel=MODEL),
    ] = "sla",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Default: as the model's SLA has it, or 0.95.", rich_help_panel=MODEL, show_default=False),
    ] = None,
    negligible: Annotated[
        float | None, typer.Option(help="Fraction of blocks neither branch sees.", rich_help_panel=MODEL)
    ] = None,
    linear_domain: Annotated[
        LinearDomain | None, typer.Option(help="What the linear branch sees: all or marginal.", rich_help_panel=MODEL)
    ] = None,
    feature_map: Annotated[FeatureMap | None, typer.Option(help="softmax, elu or relu.", rich_help_panel=MODEL)] = None,
    block_m: Annotated[int | None, typer.Option(help="Query rows of a block.", rich_help_panel=MODEL)] = None,
    block_n: Annotated[int | None, typer.Option(help="Key columns of a block.", rich_help_panel=MODEL)] = None,
    anneal_from: Annotated[
        float | None,
        typer.Option(help="Sparsity to begin with; it rises over half of the steps.", rich_help_panel=MODEL),
    ] = None,
    loss: Annotated[
        Loss, typer.Option(help="distill: the dense model's velocity; flow: the data's.", rich_help_panel=TRAINING)
    ] = "distill",
    layer_loss: Annotated[
        float, typer.Option(help="Weight of each layer's attention error.", rich_help_panel=TRAINING)
    ] = 0.0,
    train: Annotated[
        Trained, typer.Option(help="all, attn, proj or lora (and proj_l).", rich_help_panel=TRAINING)
    ] = "all",
    lora_rank: Annotated[int | None, typer.Option(help="Rank of lora. Default: 32.", rich_help_panel=TRAINING)] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps. Default, as of the six below: the model's own.", rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=TRAINING)] = None,
    proj_multiplier: Annotated[
        float | None, typer.Option(help="Factor on it for proj_l.", rich_help_panel=TRAINING)
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps it rises over, at most a tenth.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Clips a step, over all processes.", rich_help_panel=TRAINING)
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Clips at a time on one device.", rich_help_panel=TRAINING)
    ] = None,
    caption_dropout: Annotated[
        float | None,
        typer.Option(help="Fraction trained on the negative prompt, for guidance.", rich_help_panel=TRAINING),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 0.01,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Cut longer gradients. Default: none.", rich_help_panel=TRAINING)
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="adamw or adamw8bit (not with fsdp).", rich_help_panel=TRAINING)
    ] = "adamw",
    seed: TuneSeedOption = 0,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            rich_help_panel=MACHINE,
            show_default=False,
            help="Recompute activations, to save memory. Default: on CUDA.",
        ),
    ] = None,
    dtype: TuneDtypeOption = "auto",
    device: TuneDeviceOption = "auto",
    backend: Annotated[
        Backend, typer.Option(help="SLA's implementation: auto, reference, torch or triton.", rich_help_panel=MACHINE)
    ] = "auto",
    parallel: Annotated[
        Parallel, typer.Option(help="Under torchrun: ddp copies the model, fsdp splits it.", rich_help_panel=MACHINE)
    ] = "auto",
    context_parallel: Annotated[
        int, typer.Option(help="Under torchrun: processes that share a clip's tokens.", rich_help_panel=MACHINE)
    ] = 1,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints. Default: a tenth, at least 10.", rich_help_panel=OUTPUT),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations with clips. Default: half.", rich_help_panel=OUTPUT)
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew in a folder with a checkpoint.", rich_help_panel=OUTPUT)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files too.", rich_help_panel=OUTPUT)
    ] = False,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="A folder for weights, checkpoints, log and page.", rich_help_panel=OUTPUT),
    ] = "finetuned",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Give a Wan model sparse-linear attention, and see that it worked; the same command again goes on.

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
    width, height = parse_size(size)
    config = FinetuneConfig(
        data=DataConfig(data, self_generate, clips_per_prompt, held_out, width, height, num_frames, fps),
        model=model,
        weights=weights,
        from_dense=from_dense,
        local_files_only=local_files_only,
        output=output,
        attention=attention,
        sparsity=sparsity,
        negligible=negligible,
        linear_domain=linear_domain,
        feature_map=feature_map,
        block_m=block_m,
        block_n=block_n,
        anneal_from=anneal_from,
        loss=loss,
        layer_loss=layer_loss,
        train=train,
        lora_rank=lora_rank,
        steps=steps,
        lr=lr,
        proj_multiplier=proj_multiplier,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        caption_dropout=caption_dropout,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optimizer=optimizer,
        checkpointing=checkpointing,
        seed=seed,
        dtype=parse_dtype(dtype),
        device=device,
        backend=backend,
        parallel=parallel,
        context_parallel=context_parallel,
        save_every=save_every,
        validate_every=validate_every,
        restart=restart,
        tensorboard=tensorboard,
    )
    from slagen.cli import console

    with console.GenerateProgress() as progress:
        from slagen.training import finetune as task

        result = task.finetune(config, progress)
    if result.rank == 0:
        console.show_finetune(result, as_json)


@tuning.command("data", cls=_Command, context_settings=CONTEXT)
def finetune_data(
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
    model: TuneModelOption = None,
    held_out: HeldOutOption = None,
    size: DataSizeOption = None,
    num_frames: DataFramesOption = None,
    fps: DataFpsOption = None,
    seed: TuneSeedOption = 0,
    dtype: TuneDtypeOption = "auto",
    device: TuneDeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Encode videos and captions for finetune --data, once; what is there already is kept.

    Example: slagen finetune data videos --output prepared --model wan2.1-t2v-1.3b
    """
    check_folder("output", output)
    width, height = parse_size(size)
    config = DataConfig(path, None, held_out=held_out, width=width, height=height, num_frames=num_frames, fps=fps)
    from slagen.cli import console

    with console.GenerateProgress() as progress:
        from slagen.training.data import dataset as task
        from slagen.training.finetune import default_model

        base = GenerateConfig("-", model=default_model(model, device), device=device, dtype=parse_dtype(dtype))
        data = task.prepare(config, base, user_path(output), user_path(CACHE), seed, progress)
    console.show_data(data, as_json)


WHAT, HOW = "What to measure", "How to measure"


@app.command(cls=_Command, context_settings=CONTEXT)
def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=WHAT,
            show_default=False,
            help="wan-1.3b-480p, wan-1.3b-720p, wan-14b-480p, wan-14b-720p, tiny-wan, or batch x heads x tokens x head "
            "dimension, such as 1x12x8192x128. May be repeated. Default: wan-1.3b-480p.",
        ),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            rich_help_panel=WHAT,
            show_default=False,
            help="May be repeated. Default: 0.8, 0.9, 0.95 and 0.97; for a model 0.95.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=WHAT,
            show_default=False,
            help="sla, sparse, sdpa, sdpa-flash, sdpa-cudnn, sdpa-efficient, sdpa-math, flash-attn, sage, flashinfer, "
            "flex, cudnn-blocks, flashinfer-blocks or sla-public. May be repeated. Default: all.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            rich_help_panel=WHAT,
            show_default=False,
            help="Tokens, for the length sweep; may be repeated. Default: doubling from 1,024 up to the shape's.",
        ),
    ] = None,
    length_sweep: Annotated[
        bool, typer.Option("--length-sweep/--no-length-sweep", help="Time shorter sequences too.", rich_help_panel=WHAT)
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", rich_help_panel=WHAT, help="Time this model's denoising loop: a preset, folder or hub id."
        ),
    ] = None,
    random_init: Annotated[
        RandomInit | None,
        typer.Option(help="The same for a random Wan of true size: wan-1.3b or wan-14b.", rich_help_panel=WHAT),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Width x height of the loop, in pixels.", rich_help_panel=WHAT, metavar="WxH")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Video frames of the loop.", rich_help_panel=WHAT)] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the loop.", rich_help_panel=WHAT)] = 4,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time the loop with torch.compile as well.", rich_help_panel=WHAT)
    ] = False,
    backend: Annotated[
        Backend, typer.Option(help="SLA's implementation: auto, reference, torch or triton.", rich_help_panel=HOW)
    ] = "auto",
    linear_domain: Annotated[
        LinearDomain, typer.Option(help="What the linear branch sees: all or marginal.", rich_help_panel=HOW)
    ] = "all",
    feature_map: Annotated[FeatureMap, typer.Option(help="softmax, elu or relu.", rich_help_panel=HOW)] = "softmax",
    block_m: Annotated[int, typer.Option(help="Query rows of a block.", rich_help_panel=HOW)] = 64,
    block_n: Annotated[int, typer.Option(help="Key columns of a block.", rich_help_panel=HOW)] = 64,
    dtype: Annotated[
        str, typer.Option(help="auto, bf16, fp16 or fp32. auto: bf16 on CUDA, fp32 on a CPU.", rich_help_panel=HOW)
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=HOW)] = "auto",
    backward: Annotated[
        bool | None,
        typer.Option(
            "--backward/--no-backward", help="Time the backward pass too. Default: on CUDA.", rich_help_panel=HOW
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each measurement.", rich_help_panel=HOW)] = 2.0,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="A folder for bench.json, .md, .png and .svg.", rich_help_panel=OUTPUT),
    ] = "outputs/bench",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Time SLA against dense attention and other sparse attention on this machine; what is wrong is not timed.

    Example: slagen bench --shape 1x12x8192x128 --sparsity 0.95 --output results
    """
    width, height = parse_size(size)
    config = BenchConfig(
        shapes=tuple(shape or ["wan-1.3b-480p"]),
        sparsities=tuple(sparsity or ()),
        methods=tuple(method or ()),
        backend=backend,
        linear_domain=linear_domain,
        feature_map=feature_map,
        block_m=block_m,
        block_n=block_n,
        dtype=parse_dtype(dtype),
        device=device,
        backward=backward,
        lengths=tuple(length) if length else None if length_sweep else (),
        seconds=seconds,
        model=model,
        random_init=random_init,
        width=width,
        height=height,
        num_frames=num_frames,
        steps=steps,
        compile=compiled,
        output=output,
    )
    from slagen.benchmark import run as task
    from slagen.cli import console

    result = task.bench(config, console.note)
    console.show_bench(result, as_json)


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
    """Say what this machine can do, and what to mend.

    Example: slagen doctor --selftest
    """
    from slagen.cli import console
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
        console.show_selftest(content, path, as_json)
        trials.check(content)
        return
    if kernels:
        content = task.kernel_costs(console.note)
        console.show_kernels(content, as_json)
        task.check_kernels(content)
        return
    findings = task.examine()
    console.show_findings(findings, as_json)
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


def parse_dtype(text: str) -> Dtype:
    """A dtype by its short name, or by PyTorch's. Raises UsageError."""
    full = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    name = full.get(text.lower(), text.lower())
    if name not in get_args(Dtype):
        raise UsageError(f"dtype is {quote(text)}, but must be one of {', '.join(get_args(Dtype))}. Try --dtype auto.")
    return cast(Dtype, name)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """(i, n) from "i/n". Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None:
        raise UsageError(f"shard is {quote(text)}, but must be i/n, such as 1/4 on the first of four machines.")
    return int(match[1]), int(match[2])


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height from "832x480" or "832*480", None twice from None. Raises UsageError."""
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX*×]\s*(\d{1,5})\s*", text)
    if match is None:
        raise UsageError(f"size is {quote(text)}, but must be width x height in pixels. Try --size 832x480.")
    return int(match[1]), int(match[2])


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


def _show_error(text: str) -> None:
    from slagen.cli import console

    console.show_error(text)


def _debug() -> None:
    if os.environ.get("SLAGEN_DEBUG") == "1":
        sys.stderr.write(escaped(traceback.format_exc()))
