"""The student with its attention installed, its frozen teacher, and how much memory they need."""

from typing import Any

from torch import nn

from slagen.training.trainer import Recipe


def memory_plan(
    student: nn.Module, teacher: nn.Module, recipe: Recipe, num_tokens: int, parts: int, recomputes: bool
) -> str:
    """How much memory each process will need, in words: an estimate from sizes, before anything is allocated.

    Args:
        num_tokens: of the longest clip. parts: processes that student and teacher are split over.
        recomputes: whether activations are recomputed in the backward pass.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters()) - trained
    state = 2 if recipe.optimizer == "adamw8bit" else 8
    weights = (4 * frozen + (4 + 4 + 4 + state) * trained) / parts  # value, gradient, average, optimiser
    other = sum(p.numel() * p.element_size() for p in teacher.parameters())
    config: Any = student.config
    width, bytes_each = config.num_attention_heads * config.attention_head_dim, recipe.dtype.itemsize
    block = num_tokens * (14 * width + 3 * config.ffn_dim) * bytes_each  # what one block keeps for its backward pass
    kept = num_tokens * width * 4 * config.num_layers + block if recomputes else block * config.num_layers
    gib = [size / 2**30 for size in (weights, other / parts, kept * recipe.schedule.micro_batch)]
    student_gib, teacher_gib, activations_gib = gib
    return (
        f"{trained / 1e6:.1f} M of {(trained + frozen) / 1e6:.1f} M parameters train; memory about {sum(gib):.1f} GiB: "
        f"{student_gib:.1f} student, optimiser and average, {teacher_gib:.1f} teacher, {activations_gib:.1f} "
        f"activations of {num_tokens} tokens"
    )
