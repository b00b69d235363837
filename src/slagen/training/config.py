"""FinetuneConfig and DataConfig: the settings of one call of `slagen finetune`. No torch here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slagen.attention import registry
from slagen.attention.protocol import Grid, Method
from slagen.attention.schedule_file import as_text
from slagen.attention.sla.config import (
    BLOCK_SIZES,
    FeatureMap,
    LinearDomain,
    SLAConfig,
    check_choice,
    check_fraction,
)
from slagen.errors import UsageError
from slagen.generation.config import MAX_SEED, OUTPUT, Attention, AttentionBackend, Dtype, GenerateConfig
from slagen.io.forms import shown
from slagen.io.paths import check_folder
from slagen.io.text import read_device
from slagen.settings import option
from slagen.training.method_checks import InitFrom, check_backward, check_init_from, check_schedule, check_stages
from slagen.wan.defaults import MAX_STRENGTH, MAX_TRAINING


def _check_count(name: str, value: object) -> None:
    most = MAX_TRAINING[name]
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise UsageError(
            f"{name} is {shown(value)}, but must be a whole number from 1 to {most:,}. "
            f"Try --{name.replace('_', '-')} 1."
        )


DATA, MODEL, TRAINING, MACHINE = "Data", "Model and attention", "Training", "Machine"
OWN_FIELDS = ("sparsity", "negligible", "linear_domain", "feature_map", "block_m", "block_n")  # of methods' configs
OF_SPARSITY = ("sparsity_schedule", "anneal_from")  # of methods with one
Loss = Literal["distill", "flow"]
Trained = Literal["all", "attn", "proj", "lora"]
Stages = Literal["all", "router,all", "router"]
Optimizer = Literal["adamw", "adamw8bit", "muon"]
Parallel = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to train on, and in what form.

    Args:
        path: raw or prepared data; None where the model makes its own.
        self_generate: a prompt file whose videos the dense model makes, to be distilled on.
        clips_per_prompt: how many clips of each such prompt to train on, 4 unless given; one more is held out.
        held_out: clips of a data set that are never trained on; None is a tenth, from 1 to 16.
        width, height, num_frames, fps: the size of clips, whose area and length no clip exceeds; None is the model's.
        no_upscale: clips of smaller videos keep about their own area; otherwise they are enlarged.
    Raises: UsageError if a value is out of range, or no data or two kinds of it are given.
    """

    path: str | None = option(
        None, "Folder or list of videos with captions, or a data set prepared with slagen finetune data.", panel=DATA,
        name="data", metavar="PATH",
    )  # fmt: skip
    self_generate: str | None = option(
        None, "File of prompts from which the dense model generates training clips (instead of --data).", panel=DATA,
        metavar="FILE",
    )  # fmt: skip
    clips_per_prompt: int | None = option(
        None,
        "Number of training clips per prompt, besides one that is held out. A --num-videos in the prompt's line takes "
        "precedence. Default: 4.",
        panel=DATA,
    )
    held_out: int | None = option(
        None, "Number of clips held out for validation. Default: a tenth of all clips, at least 1 and at most 16.",
        panel=DATA,
    )  # fmt: skip
    width: int | None = option(
        None,
        "Maximum area of a clip, given as width x height. Each video is cropped to the nearest supported aspect ratio.",
        panel=DATA, metavar="WxH", is_size=True,
    )  # fmt: skip
    height: int | None = option(None, "In pixels.", panel=DATA, hidden=True)
    num_frames: int | None = option(None, "Maximum number of frames in a clip: a multiple of 4, plus 1.", panel=DATA)
    fps: int | None = option(None, "Frames per second of the clips.", panel=DATA)
    no_upscale: bool = option(
        False, "Do not enlarge videos that are smaller than --size; they stay at about their original size.", panel=DATA
    )

    def __post_init__(self) -> None:
        if (self.path is None) == (self.self_generate is None):
            raise UsageError("give either --data FOLDER with videos, or --self-generate FILE with prompts.")
        for name in ("clips_per_prompt", "held_out"):
            _check_count(name, getattr(self, name))
        if self.held_out is not None and self.self_generate is not None:
            raise UsageError(
                "--self-generate holds out one clip of each prompt, so --held-out has no effect. Leave it out."
            )
        if self.no_upscale and self.self_generate is not None:
            raise UsageError("--no-upscale is for the videos of --data. Leave it out, or give --data.")
        if self.clips_per_prompt is not None and self.path is not None:
            raise UsageError(
                "--clips-per-prompt is for --self-generate. With --data, every video is one clip. Leave "
                "--clips-per-prompt out."
            )
        GenerateConfig("-", width=self.width, height=self.height, num_frames=self.num_frames, fps=self.fps)


@dataclass(frozen=True)
class FinetuneConfig:
    """One call of `slagen finetune`. What is None is the model's own default.

    Args:
        data: what to train on.
        model: preset, folder or hub id; None is Wan2.1 1.3B on CUDA and the bundled model elsewhere.
        weights: SLA weights to go on from, or a whole transformer; None takes the model's own.
        from_dense: begin with the model's dense weights and what the attention learns fresh: of SLA `proj_l`.
        init_from: "mean" fits SLA's fresh `proj_l` to that method first; see `init_from.py`.
        output: a folder for `sla.safetensors`, checkpoints, log, clips and page, and for the transformer where
            `weights` is a whole one of your own.
        attention: a method's name, see `slagen methods`; "dense" for a control that is tuned as long.
        sparsity, and from negligible the five after it: as in SLAConfig; None is what the weights were trained with, or
            SLAConfig's.
        sparsity_schedule: the sparsity of each layer, in the form of GenerateConfig; of a file that `slagen tune`
            wrote, the config holds the content.
        attention_options: (name, value) of options that only this method has.
        anneal_from: sparsity to begin with; it rises to `sparsity` over the first half of the steps.
        loss: "distill" is the squared difference of the student's velocity from the frozen dense model's on the same
            noisy latents, "flow" from the data's. layer_loss: weight of the same for every layer's attention.
        train: "all" of the transformer, "attn": its self-attention, "proj": what the attention learns alone (of SLA
            `proj_l`), or "lora": that, and low-rank changes of self-attention, of rank `lora_rank` (None is 32).
        stages: "router,all" first trains what chooses blocks, and their mix, for `router_steps` (None is half of the
            steps), then what `train` says; "router" ends there, and "all" has no such steps.
        steps, lr, proj_multiplier, warmup_steps, batch_size, micro_batch, caption_dropout: see TrainingDefaults.
        weight_decay: of the optimizer. max_grad_norm: longer gradients are cut to it; None cuts none.
        optimizer: "adamw8bit" keeps its state in 8 bits (bitsandbytes); "muon" is torch.optim.Muon for the matrices of
            the blocks, with updates as large as AdamW's, and AdamW for the rest.
        checkpointing: recompute activations in the backward pass; None does on CUDA.
        seed: of noise and order. dtype: to compute in; weights stay in float32. device, backend: as in GenerateConfig.
        parallel: how the processes of torchrun share the model: "ddp" copies it, "fsdp" splits it; "auto" copies.
        context_parallel: processes that share one clip's tokens.
        save_every, validate_every: steps between checkpoints, and between validations with clips; None is a tenth of
            all steps, at least 10, for the first, and half of them for the second.
        restart: start over although the output folder holds a checkpoint.
        tensorboard: also write TensorBoard's event files.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    data: DataConfig = option(dataclasses.MISSING, in_key=False)
    model: str | None = option(
        None,
        "A preset, a model folder, or a Hugging Face id. The command slagen models lists the presets. Default: "
        "wan2.1-t2v-1.3b with a CUDA device, otherwise the bundled tiny-wan.",
        panel=MODEL, short="-m",
    )  # fmt: skip
    weights: str | None = option(
        None, "SLA weights or a whole transformer to start from.", panel=MODEL, metavar="FILE_OR_FOLDER", in_key=False
    )
    from_dense: bool = option(
        False, "Start from dense weights, with untrained attention weights (SLA's proj_l is zero).", panel=MODEL
    )
    init_from: InitFrom | None = option(
        None,
        "Before the first step, fit SLA's proj_l to the output of the training-free method mean, by least squares on "
        "training clips: mean. With --from-dense.",
        panel=MODEL,
    )
    local_files_only: bool = option(False, "Use local files only; download nothing.", panel=MODEL, pixels=False)
    attention: Attention = option(
        "sla",
        "Attention method to train: sla, or another that has a backward pass. For comparison: sparse or linear (one "
        "branch of SLA alone), or dense.",
        panel=MODEL,
    )  # fmt: skip
    sparsity: float | None = option(
        None,
        "Fraction of key blocks without exact attention. Default: the value from training, or the method's own (0.95 "
        "for sla).",
        panel=MODEL, complement="keep",
    )  # fmt: skip
    sparsity_schedule: str | None = option(
        None,
        "Sparsity of each layer, such as 0-:0.8/0.9/0.95, or a file of slagen tune that ends in .json. It must be the "
        "same in all denoising steps, which training does not know.",
        panel=MODEL, metavar="0-:SPARSITY/...",
    )  # fmt: skip
    negligible: float | None = option(
        None, "Fraction of key blocks that neither the exact nor the linear branch attends to.", panel=MODEL
    )
    linear_domain: LinearDomain | None = option(
        None, "Key blocks that the linear branch attends to: all, or marginal (neither exact nor negligible).",
        panel=MODEL,
    )  # fmt: skip
    feature_map: FeatureMap | None = option(
        None, "Feature map of the linear branch: softmax, elu or relu.", panel=MODEL
    )
    block_m: int | None = option(None, "Query rows per block: 16, 32, 64 or 128.", panel=MODEL)
    block_n: int | None = option(None, "Key columns per block: 16, 32, 64 or 128.", panel=MODEL)
    attention_options: tuple[tuple[str, Any], ...] = option((), panel=MODEL, of_methods=True, trainable=True)
    anneal_from: float | None = option(
        None, "Initial sparsity, which rises to --sparsity over the first half of the steps.", panel=MODEL
    )
    loss: Loss = option(
        "distill",
        "Target velocity: distill (the prediction of the dense model) or flow (from the data, as in flow matching).",
        panel=TRAINING,
    )
    layer_loss: float = option(
        0.0, "Weight, in the loss, of each layer's attention error relative to the dense teacher.", panel=TRAINING
    )
    train: Trained = option(
        "all",
        "Weights to train: all, attn (self-attention), proj (only the attention method's own weights, such as SLA's "
        "proj_l), or lora (those of proj, and a LoRA on self-attention).",
        panel=TRAINING,
    )
    lora_rank: int | None = option(None, "Rank of the LoRA of --train lora. Default: 32.", panel=TRAINING)
    stages: Stages = option(
        "all",
        "Training stages: all, or, for a method with a router (sla2), router or router,all. The router stage comes "
        "first and trains the router of each layer to match dense attention.",
        panel=TRAINING,
    )
    router_steps: int | None = option(
        None, "Steps of the router stage with --stages router,all. Default: half of --steps.", panel=TRAINING
    )
    steps: int | None = option(
        None, "Number of optimizer steps, router stage included. Default: depends on the model.", panel=TRAINING
    )
    lr: float | None = option(None, "Learning rate. Default: depends on the model.", panel=TRAINING)
    proj_multiplier: float | None = option(
        None, "Factor on the learning rate of weights like SLA's proj_l. Default: depends on the model.", panel=TRAINING
    )
    warmup_steps: int | None = option(
        None, "Learning-rate warm-up steps, at most a tenth of --steps. Default: depends on the model.", panel=TRAINING
    )
    batch_size: int | None = option(
        None, "Clips per optimizer step, over all devices. Default: depends on the model.", panel=TRAINING
    )
    micro_batch: int | None = option(
        None, "Clips that one device processes at a time. Default: depends on the model.", panel=TRAINING, pixels=False
    )
    caption_dropout: float | None = option(
        None, "Fraction of captions replaced by the negative prompt, for guidance. Default: depends on the model.",
        panel=TRAINING,
    )  # fmt: skip
    weight_decay: float = option(0.01, "Weight decay of the optimizer.", panel=TRAINING)
    max_grad_norm: float | None = option(
        None, "Maximum gradient norm; larger gradients are scaled down to it. Default: no limit.", panel=TRAINING
    )
    optimizer: Optimizer = option(
        "adamw",
        "adamw; adamw8bit, which keeps its state in 8 bits; or muon, which orthogonalises the updates of the blocks' "
        "matrices (neither with --parallel fsdp).",
        panel=TRAINING,
    )
    checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass to save memory. Default: on CUDA only.", panel=MACHINE,
        pixels=False,
    )  # fmt: skip
    seed: int = option(0, "Seed of the noise, the order of clips and the choice of held-out clips.", panel=TRAINING)
    dtype: Dtype = option(
        "auto", "Compute dtype: bf16, fp32, or auto (bf16 on a GPU that supports it, otherwise fp32).", panel=MACHINE
    )
    device: str = option("auto", "Device to run on: auto, cpu or cuda.", panel=MACHINE, read=read_device, pixels=False)
    backend: AttentionBackend = option(
        "auto", "Implementation of the attention method; for sla: auto, reference, torch or triton.", panel=MACHINE,
        metavar="NAME",
    )  # fmt: skip
    parallel: Parallel = option(
        "auto", "Parallelism under torchrun: ddp copies the model to each process, fsdp shards it, auto means ddp.",
        panel=MACHINE, pixels=False,
    )  # fmt: skip
    context_parallel: int = option(
        1, "Number of torchrun processes that share the tokens of each clip.", panel=MACHINE, pixels=False
    )
    save_every: int | None = option(
        None, "Steps between checkpoints. Default: a tenth of all steps, at least 10.", panel=OUTPUT, pixels=False
    )
    validate_every: int | None = option(
        None, "Steps between validations, which also generate clips. Default: half of all steps.", panel=OUTPUT,
        pixels=False,
    )  # fmt: skip
    restart: bool = option(
        False, "Start over, even if --output has a checkpoint to resume from.", panel=OUTPUT, pixels=False
    )
    tensorboard: bool = option(False, "Also write TensorBoard event files.", panel=OUTPUT, pixels=False)
    output: str = option(
        "finetuned", "Folder for the weights, checkpoints, log and report page.", panel=OUTPUT, short="-o", pixels=False
    )

    def __post_init__(self) -> None:
        check_folder("output", self.output)
        object.__setattr__(self, "sparsity_schedule", as_text(self.sparsity_schedule, self.attention))
        for name, kinds in (("loss", Loss), ("train", Trained), ("optimizer", Optimizer),
                            ("dtype", Dtype), ("parallel", Parallel), ("stages", Stages)):  # fmt: skip
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(
                    f"{name} is {shown(getattr(self, name))}, but must be one of {', '.join(get_args(kinds))}."
                )
        for name in ("steps", "batch_size", "micro_batch", "lora_rank", "context_parallel", "save_every",
                     "validate_every"):  # fmt: skip
            _check_count(name, getattr(self, name))
        for name in ("lr", "proj_multiplier", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(
                    f"{name} is {value}, but must be a finite number above 0. Leave it out for the default."
                )
        for name in ("weight_decay", "layer_loss", "warmup_steps"):
            value, most = getattr(self, name), MAX_TRAINING.get(name, MAX_STRENGTH)
            if value is not None and not 0 <= value <= most:
                raise UsageError(
                    f"{name} is {shown(value)}, but must be from 0 to {most:,.0f}. Leave it out for the default."
                )
        for name, example in (("sparsity", 0.95), ("negligible", 0.1), ("anneal_from", 0.5), ("caption_dropout", 0.1)):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name), f"Try --{name.replace('_', '-')} {example}.")
        for name in ("block_m", "block_n"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), BLOCK_SIZES)
        method = registry.get(self.attention)
        _check_method(self, method)
        _check_learning(self, method)
        if self.lora_rank is not None and self.train != "lora":
            raise UsageError(f"--lora-rank is for --train lora, but --train is {self.train}. Leave --lora-rank out.")
        if self.layer_loss > 0 and self.loss == "flow":
            raise UsageError(
                "--layer-loss compares with the dense teacher, which --loss flow does not use. Leave one of them out."
            )
        if self.dtype == "fp16":
            raise UsageError(
                "--dtype fp16 is not precise enough for training, because small gradients become 0. Try --dtype bf16 "
                "or --dtype fp32."
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed is {shown(self.seed)}, but must be from 0 to 2**63 - 1. Try --seed 42.")

    def num_router_steps(self, steps: int) -> int:
        """How many of the steps, the first ones, train the router."""
        if self.stages == "router,all":
            return min(steps, steps // 2 if self.router_steps is None else self.router_steps)
        return steps if self.stages == "router" else 0

    def attention_config(self, trained: Any) -> Any:
        """The attention that is trained: what is asked for, in place of what the weights were made with, if any were.

        For a dense control it is SLA's.
        """
        method = registry.get(self.attention)
        given = {name: getattr(self, name) for name in OWN_FIELDS} | dict(self.attention_options)
        given = {name: value for name, value in given.items() if value is not None}
        base = trained or (SLAConfig() if method.family == "dense" else method.config())
        if given.get("linear_domain") == "all" and "negligible" not in given:
            base = dataclasses.replace(base, negligible=0.0)
        return method.in_training(method.configure(base, given, Grid.flat(1)))  # of no one clip: none counts tokens


def _check_method(config: "FinetuneConfig", method: Method) -> None:
    """Raise UsageError for a method that cannot be trained, and for what it does not take."""
    asked = {name: getattr(config, name) for name in (*OWN_FIELDS, *OF_SPARSITY)} | dict(config.attention_options)
    for name, value in asked.items():
        if value is not None and ("sparsity" if name in OF_SPARSITY else name) not in method.option_names:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{name} is not an option of {method.name} attention. Leave {option} out.")
    method.config(**dict(config.attention_options))  # it checks what is out of range
    check_schedule(config)
    check_stages(config, method)
    if config.init_from is not None:
        check_init_from(config, method)
    method.check_backend(config.backend)
    check_backward(method, config.backend)


def _check_learning(config: "FinetuneConfig", method: Method) -> None:
    """Raise UsageError where nothing would train, or towards nothing."""
    is_dense = method.family == "dense"
    if is_dense and config.loss != "flow":
        raise UsageError("dense attention cannot be distilled from itself. Give --loss flow.")
    if is_dense and config.train not in ("all", "attn"):
        raise UsageError(f"train is {config.train}, but must be all or attn for dense attention. Give --train all.")
    learns = any(group.used for group in method.parameters)
    if config.proj_multiplier is not None and not learns:
        raise UsageError(
            f"{config.attention} attention has no learned weights of its own, so --proj-multiplier has no effect. "
            "Leave it out."
        )
    if not learns and not is_dense and config.train == "proj":
        raise UsageError(f"--train proj with --attention {method.name} leaves nothing to train. Try --train attn.")
