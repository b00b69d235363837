"""The student with its attention installed, its frozen teacher, and how much memory they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slagen.formats.sla import read_metadata, weights_hash
from slagen.training.lora import LORA_RANK, add_lora
from slagen.training.setup import Setup
from slagen.training.trainer import Recipe
from slagen.wan.install import install_projections, install_untrained, load_weights
from slagen.wan.processor import install, install_method, set_layers
from slagen.wan.sequence_parallel import split_tokens
from slagen.wan.transformer import load_transformer

# of the optimizer's state, for each trained parameter; Muon keeps AdamW's for the few outside the blocks' matrices
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4}


@dataclass(frozen=True)
class Models:
    """The two models of a training.

    Args:
        student: float32, with its attention installed and `requires_grad` set on what trains.
        teacher: the same model with dense attention, frozen.
        base_hash: of the student's weights before its attention was installed.
        steps_before: steps that the attention's weights had been trained for.
    """

    student: Any
    teacher: Any
    base_hash: str
    steps_before: int


def build_models(setup: Setup) -> Models:
    """Load student and teacher, both still on the CPU. Raises WeightsError for weights that do not fit."""
    config, source, group = setup.config, setup.weights.source, setup.team.context_group
    student = load_transformer(source, torch.float32)
    base_hash = weights_hash(student)
    steps_before = _install_attention(student, setup, base_hash)
    if setup.layer_sparsities is not None:
        set_layers(student, setup.layer_configs())
    if config.train == "lora":
        add_lora(student, config.lora_rank or LORA_RANK, config.seed)
    _choose_trained(student, setup)
    if recomputes(config.checkpointing, setup.team.device):
        student.enable_gradient_checkpointing()
    teacher = load_transformer(source, setup.recipe.dtype)
    install(teacher, None)
    if group is not None:
        for transformer in (student, teacher):
            split_tokens(transformer, group)
    return Models(student.train(), teacher.requires_grad_(False), base_hash, steps_before)


def recomputes(checkpointing: bool | None, device: torch.device) -> bool:
    """Whether activations are recomputed in the backward pass: as asked for, and on CUDA where nothing is."""
    return device.type == "cuda" if checkpointing is None else checkpointing


def _install_attention(student: Any, setup: Setup, base_hash: str) -> int:
    """Give the student its attention, fresh or as it was trained; returns the steps that it was trained for."""
    config, weights, method = setup.config, setup.weights, setup.method
    if setup.is_dense:
        install_method(student, method, method.config(), backend=config.backend)
    elif config.from_dense or weights.sla_path is None:
        install_untrained(student, setup.attention, config.backend, method)
        for name, parameter in student.named_parameters():
            group = method.group(name)
            if group is not None and group.identity and parameter.ndim == 2:  # the output is O^l at first
                torch.nn.init.eye_(parameter)
    elif weights.sla_alone:
        load_weights(
            student, weights.sla_path, method, config=setup.attention, backend=config.backend, allow_untrained=True,
            base_hash=base_hash,
        )  # fmt: skip
        return read_metadata(weights.sla_path).steps
    else:
        install_projections(
            student, weights.sla_path, setup.attention, method=method, backend=config.backend, allow_untrained=True
        )
    return 0


def _choose_trained(student: Any, setup: Setup) -> None:
    """Set `requires_grad` on the parameters that `--train` asks for; in a layer that attends to everything, what the
    attention learns is not reached."""
    dense = tuple(f"blocks.{layer}." for layer, sparsity in enumerate(setup.layer_sparsities or ()) if sparsity == 0)
    for name, parameter in student.named_parameters():
        group = setup.method.group(name)
        alone = setup.config.stages == "router"  # then nothing else is reached
        trained = {
            "all": True, "attn": ".attn1." in name, "proj": group is not None,
            "lora": group is not None or ".lora_" in name,
        }["proj" if alone else setup.config.train]  # fmt: skip
        learns = group is None or (
            group.used and (group.stage is None or group.stage in setup.config.stages.split(","))
            and not name.startswith(dense)
        )  # fmt: skip
        parameter.requires_grad_(trained and learns)


def checkpoint_bytes(student: nn.Module, recipe: Recipe) -> int:
    """The size of a checkpoint: trained weights, their average, and the optimiser's state."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return (8 + STATE_BYTES[recipe.optimizer]) * trained


def memory_plan(
    student: nn.Module, teacher: nn.Module, recipe: Recipe, num_tokens: int, parts: int, recomputes: bool
) -> str:
    """A sentence on the memory that each process will need, estimated from sizes before anything is allocated.

    Args:
        num_tokens: of the longest clip. parts: number of processes that student and teacher are sharded over.
        recomputes: whether activations are recomputed in the backward pass.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters()) - trained
    weights = (4 * frozen + (4 + 4 + 4 + STATE_BYTES[recipe.optimizer]) * trained) / parts  # value, gradient, average
    other = sum(p.numel() * p.element_size() for p in teacher.parameters())
    config: Any = student.config
    width, bytes_each = config.num_attention_heads * config.attention_head_dim, recipe.dtype.itemsize
    block = num_tokens * (14 * width + 3 * config.ffn_dim) * bytes_each  # one block's activations for its backward pass
    kept = num_tokens * width * 4 * config.num_layers + block if recomputes else block * config.num_layers
    gib = [size / 2**30 for size in (weights, other / parts, kept * recipe.schedule.micro_batch)]
    student_gib, teacher_gib, activations_gib = gib
    return (
        f"training {trained / 1e6:.1f} M of {(trained + frozen) / 1e6:.1f} M parameters; each process needs an "
        f"estimated {sum(gib):.1f} GiB: {student_gib:.1f} for the student with its optimizer state and averaged "
        f"weights, {teacher_gib:.1f} for the teacher, and {activations_gib:.1f} for the activations of {num_tokens} "
        "tokens"
    )
