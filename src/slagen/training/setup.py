"""Check the settings of a training and fill in the model's defaults, before data or models are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slagen.attention import registry
from slagen.attention.choices import in_all_steps
from slagen.attention.learned import label, name_in_files
from slagen.attention.protocol import Grid, Method
from slagen.attention.schedule import check_num_layers
from slagen.errors import UsageError, WeightsError
from slagen.events import Event
from slagen.formats.model_files import SLA_FILE
from slagen.generation.config import CACHE, GenerateConfig
from slagen.generation.resolve import Weights, find_weights
from slagen.io.paths import user_path
from slagen.machine import pick_device, pick_dtype
from slagen.training.config import FinetuneConfig
from slagen.training.data.dataset import Clip, Dataset
from slagen.training.distributed import Team
from slagen.training.log import Emit
from slagen.training.lora import lora_config
from slagen.training.method_checks import IN_ONE_PROCESS, check_backward
from slagen.training.output_folder import TRANSFORMER_FILE
from slagen.training.trainer import Recipe, optimizer_8bit
from slagen.wan.defaults import TrainingDefaults
from slagen.wan.folder import check_image

DEFAULT_ON_CUDA = "wan2.1-t2v-1.3b"  # generate's default on CUDA is a few-step model, which cannot be a teacher


@dataclass(frozen=True)
class Setup:
    """The checked settings of a training, with every default filled in.

    Args:
        folder: for the output. emit: called with each stage, note, warning and step.
        method: the student's attention. base: how the dense model would generate: model, device, dtype, backend.
        weights: where the model and its attention's weights lie. attention: the method's config at the end, of a
            dense control SLA's; where layers differ, with the mean of their sparsities.
        layer_sparsities: the sparsity of each layer at the end, where there is not one for all.
        recipe: how the student is trained.
    """

    config: FinetuneConfig
    folder: Path
    team: Team
    emit: Emit
    method: Method
    base: GenerateConfig
    weights: Weights
    attention: Any
    recipe: Recipe
    layer_sparsities: tuple[float, ...] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the student is a control, with dense attention."""
        return self.method.family == "dense"

    def layer_configs(self, anneal_from: float | None = None, part: float = 1.0) -> list[Any]:
        """The config of each layer's attention.

        Args: anneal_from, part: a sparsity, and how far each layer that has a higher one has come from it.
        """
        final = self.layer_sparsities
        configs = [self.attention] * self.weights.source.shape.num_layers
        if final is not None:
            configs = [dataclasses.replace(self.attention, sparsity=sparsity) for sparsity in final]
        if anneal_from is None:
            return configs
        starts = [min(anneal_from, config.sparsity) for config in configs]
        return [
            dataclasses.replace(config, sparsity=start + (config.sparsity - start) * part)
            for start, config in zip(starts, configs, strict=True)
        ]

    def sparse_configs(self, anneal_from: float | None = None, part: float = 1.0) -> list[Any]:
        """Those of the layers that are not dense for their sparsity of 0."""
        configs = self.layer_configs(anneal_from, part)
        own = self.layer_sparsities or (1.0,) * len(configs)
        return [config for config, sparsity in zip(configs, own, strict=True) if sparsity > 0] or configs

    @property
    def schedule(self) -> TrainingDefaults:
        """Steps, learning rate and batches."""
        return self.recipe.schedule

    @property
    def cache(self) -> Path:
        """Where hashes of files are remembered."""
        return user_path(CACHE)

    def grid(self, clip: Clip) -> Grid:
        """The tokens of a clip in self-attention."""
        patch = self.weights.source.patch_size
        return Grid(*(size // part for size, part in zip(clip.shape[1:], patch, strict=True)))

    def num_tokens(self, clip: Clip) -> int:
        """L, the number of them."""
        return self.grid(clip).num_tokens


def check_setup(config: FinetuneConfig, folder: Path, team: Team, emit: Emit) -> Setup:
    """Check everything that can be checked before data or models are read.

    Raises: UsageError, WeightsError or EnvironmentProblem.
    """
    method = registry.get(config.attention)
    base = GenerateConfig(
        "-", model=default_model(config.model, str(team.device)),
        weights=config.weights, local_files_only=config.local_files_only,
        allow_untrained=True, attention=name_in_files(method),
        device=str(team.device), dtype=config.dtype, backend=config.backend,
    )  # fmt: skip
    weights = find_weights(base, lambda text: emit(Event("note", text)))
    check_image(weights.source.name, weights.source.takes_image, False)
    _check_weights(config, weights, method)
    if weights.source.weights is None:
        base = dataclasses.replace(base, weights=None)  # the dense model has no use for SLA weights
    if config.optimizer != "adamw" and team.kind == "fsdp":
        raise UsageError(
            f"{config.optimizer} does not support FSDP's sharded parameters. Leave --optimizer out, or use --parallel "
            "ddp."
        )
    attention, layers = config.attention_config(weights.trained_with), _layer_sparsities(config, weights)
    if layers is not None:
        attention = dataclasses.replace(attention, sparsity=round(sum(layers) / len(layers), 12))
    if config.anneal_from is not None and config.anneal_from > (final := max(layers or (attention.sparsity,))):
        raise UsageError(
            f"anneal_from is {config.anneal_from:g}, but must be at most the final sparsity, {final:g}. "
            "Give a lower value."
        )
    recipe = _recipe(config, weights, team)
    heads = weights.source.shape.num_heads
    if heads % config.context_parallel:
        raise UsageError(
            f"context_parallel is {config.context_parallel}, but must divide the model's number of attention heads, "
            f"{heads}."
        )
    if config.context_parallel > 1:
        method.check_context_parallel()
    about = weights.source.head_dim, team.device, recipe.dtype
    trained = method.config() if method.family == "dense" else attention
    backend = method.pick_backend(config.backend, *about, trained)
    check_backward(method, backend)
    if method.check is not None:
        method.check(backend, *about, trained)
    if config.train == "lora":
        lora_config()
    if config.optimizer == "adamw8bit":
        optimizer_8bit()
    _check_output(config, folder, weights)
    return Setup(config, folder, team, emit, method, base, weights, attention, recipe, layers)


def default_model(name: str | None, device: str) -> str | None:
    """The model that is trained unless one is named: generate's default, except on CUDA."""
    return name or (DEFAULT_ON_CUDA if pick_device(device).type == "cuda" else None)


def _check_weights(config: FinetuneConfig, weights: Weights, method: Method) -> None:
    """Raise where the weights to start from are missing, given twice, or cannot be trained."""
    if config.from_dense and config.weights is not None and weights.source.weights is None:
        name = label(method.name)
        raise UsageError(
            f"--from-dense starts without {name} weights, but --weights gives some. Leave one of them out."
        )
    if not config.from_dense and method.needs.weights and weights.sla_path is None:
        raise WeightsError(
            f"{weights.source.name} has no {label(method.name)} weights to continue from. Start with --from-dense, or "
            f"give {label(method.name)} weights with --weights."
        )
    if (file := weights.source.weights) is not None and file.suffix == ".gguf":
        raise UsageError(f"{file} is quantised and cannot be trained. Give the model in full precision.")


def _layer_sparsities(config: FinetuneConfig, weights: Weights) -> tuple[float, ...] | None:
    """The sparsity of each layer: what is asked for, or that of the weights; None where there is one for all.

    Raises: UsageError for sparsities of another number of layers.
    """
    if config.sparsity_schedule is None:
        return weights.layer_sparsities if config.sparsity is None else None
    asked, num_layers = in_all_steps(config.sparsity_schedule), weights.source.shape.num_layers
    assert asked is not None
    check_num_layers(asked, num_layers)
    return asked if isinstance(asked, tuple) else (asked,) * num_layers


def _recipe(config: FinetuneConfig, weights: Weights, team: Team) -> Recipe:
    """The model's training defaults, overridden by what the user gave. Raises UsageError for an uneven batch."""
    names = ("steps", "lr", "proj_multiplier", "warmup_steps", "batch_size", "micro_batch", "caption_dropout")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    schedule = dataclasses.replace(weights.source.defaults.training, **given)
    if schedule.batch_size % team.data_size:
        raise UsageError(
            f"batch_size is {schedule.batch_size}, but must be a multiple of the number of processes, {team.data_size}."
        )
    if config.stages != "all" and team.size > 1:
        raise UsageError(f"--stages {config.stages} runs in a single process only. Start slagen without torchrun.")
    if config.init_from is not None and team.size > 1:
        raise UsageError(IN_ONE_PROCESS)
    dtype = pick_dtype(config.dtype, team.device)
    return Recipe(
        schedule, config.loss, config.layer_loss, config.weight_decay, config.max_grad_norm, config.optimizer,
        config.seed, torch.float32 if dtype == torch.float16 else dtype,  # float16 is picked for a card without bf16
        config.num_router_steps(schedule.steps),
    )  # fmt: skip


def _check_output(config: FinetuneConfig, folder: Path, weights: Weights) -> None:
    """Raise UsageError where the result would overwrite the model or the weights that training starts from."""
    read = [weights.source.folder, config.weights, None if config.from_dense else weights.sla_path]
    written = [folder, *(folder / name for name in (SLA_FILE, TRANSFORMER_FILE, "transformer"))]
    if {user_path(p).resolve() for p in read if p is not None} & {path.resolve() for path in written}:
        raise UsageError(
            f"the model or the weights are in {folder}, where the result would overwrite them. Give another --output."
        )


def check_tokens(setup: Setup, data: Dataset) -> None:
    """Raise UsageError where a clip is too short for sparse attention, or nothing that trains is reached at first."""
    grids = {setup.grid(clip) for clip in [*data.training, *data.held_out]}
    attention = setup.attention
    sparse = [] if setup.is_dense else setup.sparse_configs()
    short = [grid.num_tokens for grid in grids if not all(setup.method.applies(each, grid) for each in sparse)]
    if short:
        num_tokens, advice = min(short), "Give larger or longer clips"
        if (block_n := getattr(attention, "block_n", None)) is not None:
            advice += ", or a smaller --block-n" if num_tokens <= block_n else ", or a higher --sparsity"
        raise UsageError(f"a clip is too short: {setup.method.nothing_to_skip(num_tokens)}. {advice}.")
    _check_start(setup, grids)


def _check_start(setup: Setup, grids: set[Grid]) -> None:
    """Raise UsageError where a training of what the attention learns alone begins with all key blocks kept: no gradient
    reaches it then."""
    config, start = setup.config, setup.config.anneal_from
    if start is None or (config.stages == "all" and config.train != "proj"):
        return
    if not all(setup.method.applies(each, grid) for each in setup.sparse_configs(start, 0.0) for grid in grids):
        raise UsageError(
            f"with --anneal-from {start:g}, all key blocks of a clip get exact attention at first, so the weights that "
            "are trained have no effect. Give a higher --anneal-from."
        )
