"""Train a student on its frozen teacher: parameters, optimizer, averaged weights, and one training step.

Everything random in a step depends only on the seed and the number of the step, so a resumed run draws what it would
have drawn uninterrupted, and the number of processes that share a step changes only the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slagen.attention.registry import parameter_group
from slagen.errors import EnvironmentProblem, SlagenError
from slagen.io.text import quote
from slagen.training.config import Loss, Optimizer
from slagen.training.data.dataset import Clip, Dataset
from slagen.training.distributed import Team, full_tensor, local_shard
from slagen.training.metrics import AttentionOutputs, mix, velocity
from slagen.training.stages import layer_distillation
from slagen.wan.defaults import TrainingDefaults

MAX_DECAY = 0.999  # of the averaged weights


@dataclass(frozen=True)
class Recipe:
    """How a student is trained, with every default filled in.

    Args:
        schedule: steps, learning rate and batches.
        max_grad_norm: gradients are clipped to it; None clips nothing. dtype: of the computation.
        router_steps: the first steps, which train the attention's router alone.
    """

    schedule: TrainingDefaults
    loss: Loss
    layer_loss: float
    weight_decay: float
    max_grad_norm: float | None
    optimizer: Optimizer
    seed: int
    dtype: torch.dtype
    router_steps: int = 0


@dataclass(frozen=True)
class StepResult:
    """The measurements of one step.

    Args:
        loss: its mean over the clips. error: relative L2 error of the velocity to the teacher's; None where the loss
            does not use the teacher, and of all layers' attention where the router is trained.
        grad_norm: before clipping. lr: of all parameters but `proj_l`. num_tokens: of all clips.
    """

    loss: float
    error: float | None
    grad_norm: float
    lr: float
    num_tokens: int


class Trainer:
    """Trains a transformer in place.

    Args:
        student: float32, with attention installed and `requires_grad` set on what trains; on its device, or for
            FSDP anywhere. teacher: frozen and shared by the team, or None where the loss needs none.
    Raises: EnvironmentProblem where the optimiser is not installed.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: Dataset, recipe: Recipe, team: Team
    ) -> None:
        self.student, self.teacher, self.data, self.recipe, self.team = student, teacher, data, recipe, team
        self.shared = team.share(student, recipe.dtype)
        self.named = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimizers = self._make_optimizers()
        self.average = {name: local_shard(p.detach()).clone() for name, p in self.named.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the recipe's dtype."""
        if self.recipe.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.team.device.type, dtype=self.recipe.dtype)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for all that trains, or with Muon one for the matrices of the blocks and one for the rest."""
        recipe, schedule = self.recipe, self.recipe.schedule
        projections = [p for name, p in self.named.items() if parameter_group(name) is not None]
        matrices = [p for name, p in self.named.items() if recipe.optimizer == "muon" and _is_hidden_matrix(name, p)]
        apart = set(map(id, projections + matrices))
        rest = [p for p in self.named.values() if id(p) not in apart]
        options: dict[str, Any] = {"lr": schedule.lr, "weight_decay": recipe.weight_decay}
        found: list[torch.optim.Optimizer] = []
        if matrices:  # its updates are as large as AdamW's are, so one learning rate suits both
            group = [{"params": matrices, "factor": 1.0}]
            found.append(torch.optim.Muon(group, **options, adjust_lr_fn="match_rms_adamw"))
        groups: list[dict[str, Any]] = [
            {"params": params, "factor": factor}
            for params, factor in ((rest, 1.0), (projections, schedule.proj_multiplier)) if params
        ]  # fmt: skip
        if groups:
            make = optimizer_8bit() if recipe.optimizer == "adamw8bit" else partial(torch.optim.AdamW, foreach=True)
            found.append(make(groups, **options, betas=(0.9, 0.999), eps=1e-8))
        return found

    def learning_rate(self, step: int) -> float:
        """At a step, from 0: linear warm-up, constant, then linear decay over the last part of the steps."""
        s = self.recipe.schedule
        warmup = min(s.warmup_steps, s.steps // 10)
        rate = min(1.0, (step + 1) / (warmup + 1))
        if s.decay > 0:
            rate *= min(1.0, (s.steps - step) / (s.decay * s.steps))
        return s.lr * rate

    def step(self, number: int) -> StepResult:
        """Train on the clips of step `number`, from 0.

        Raises: SlagenError for a loss or a gradient that is NaN or Inf; no parameter has changed then.
        """
        recipe, team = self.recipe, self.team
        batch = recipe.schedule.batch_size
        clips = self._clips(number)
        parts = team.data_size
        shares = [self._pieces([(i, clips[i]) for i in range(part, batch, parts)]) for part in range(parts)]
        pieces, passes = shares[team.data_rank], max(map(len, shares))
        levels = self._levels(number)
        rate = self.learning_rate(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        sums = torch.zeros(4, dtype=torch.float64, device=team.device)  # loss, ||difference||^2, ||teacher||^2, tokens
        for j in range(passes):  # FSDP needs as many on every process; surplus passes count nothing
            piece, counts = pieces[min(j, len(pieces) - 1)], float(j < len(pieces))
            x, noise, text = self._inputs(number, piece)
            level = torch.tensor([levels[i] for i, _ in piece], device=team.device)
            noisy = mix(x, noise, level.view(-1, 1, 1, 1, 1))
            with team.syncing(self.shared, last=j == passes - 1):
                if number < recipe.router_steps:
                    loss, difference, scale = self._router_loss(noisy, level, text)
                else:
                    loss, difference, scale = self._loss(noisy, level, text, noise - x)
                # DDP and FSDP average over all processes, so each contributes its part of the sum times their number;
                # processes that share a clip each have the gradients of their own tokens
                (loss.sum() * (counts * team.size / batch)).backward()
            tokens = difference.new_tensor(float(x[0, 0].numel() * len(piece)))
            sums += counts * torch.stack([loss.detach().sum().double(), difference, scale, tokens])
        team.total(sums).div_(team.context)  # processes that share a clip all have its loss
        loss_sum, difference_sum, scale_sum, latents = sums.tolist()
        parameters = list(self.named.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm_value = float(full_tensor(norm))
        for what, value in (("loss", loss_sum / batch), ("gradient norm", norm_value)):
            if not math.isfinite(value):
                names = ", ".join(sorted({quote(clip.caption) for clip in clips})[:4])
                raise SlagenError(
                    f"the {what} of step {number + 1} is {value} (clips: {names}). The step was discarded, and the "
                    "last checkpoint is kept. Start again with --restart and a lower --lr."
                )
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe.max_grad_norm, norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_average(number)
        error = math.sqrt(difference_sum / scale_sum) if scale_sum > 0 else None
        return StepResult(loss_sum / batch, error, norm_value, rate, int(latents) // self._patch())

    def _router_loss(self, noisy: Tensor, level: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_loss`, of every layer's attention on the teacher's queries, keys and values."""
        teacher = self.teacher
        assert teacher is not None
        with self.autocast():
            return layer_distillation(self.student, teacher, lambda: velocity(teacher, noisy, level, text))

    def _loss(self, noisy: Tensor, level: Tensor, text: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each clip (B,), and the squared norms of the difference and of the teacher's velocity."""
        zero = torch.zeros((), dtype=torch.float64, device=noisy.device)
        if self.recipe.loss == "flow":
            with self.autocast():
                found = velocity(self.shared, noisy, level, text).float()
            return (found - flow).square().mean((1, 2, 3, 4)), zero, zero
        assert self.teacher is not None
        layered = self.recipe.layer_loss > 0
        with (
            self.autocast(),
            AttentionOutputs(self.teacher) if layered else nullcontext() as expected_layers,
            AttentionOutputs(self.student) if layered else nullcontext() as found_layers,
        ):
            with torch.no_grad():
                expected = velocity(self.teacher, noisy, level, text).float()
            found = velocity(self.shared, noisy, level, text).float()
        loss = (found - expected).square().mean((1, 2, 3, 4))
        difference = (found.detach() - expected).double().square().sum()
        if expected_layers is not None and found_layers is not None:
            pairs = list(zip(expected_layers.tensors, found_layers.tensors, strict=True))
            for e, f in pairs:
                e, f = e.float(), f.float()
                wrong, right = (f - e).square().sum((1, 2)), e.square().sum((1, 2))
                if self.team.context_group is not None:  # each process has some of the tokens
                    right = self.team.over_context(right)
                    wrong = wrong + (self.team.over_context(wrong.detach()) - wrong.detach())
                loss = loss + self.recipe.layer_loss / len(pairs) * wrong / right.clamp_min(1e-12)
        return loss, difference, expected.double().square().sum()

    def _clips(self, number: int) -> list[Clip]:
        """The clips of a step; every epoch visits all clips in its own order."""
        clips, batch = self.data.training, self.recipe.schedule.batch_size
        found, orders = [], {}
        for place in range(number * batch, (number + 1) * batch):
            epoch, index = divmod(place, len(clips))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(_mix_seed(self.recipe.seed, 1, epoch))
                orders[epoch] = torch.randperm(len(clips), generator=generator).tolist()
            found.append(clips[orders[epoch][index]])
        return found

    def _levels(self, number: int) -> list[float]:
        """Stratified noise levels of a step's clips, t = sigma / (1 + sigma) with log sigma normally distributed."""
        s = self.recipe.schedule
        generator = torch.Generator().manual_seed(_mix_seed(self.recipe.seed, 2, number))
        order = torch.randperm(s.batch_size, generator=generator).double()
        u = (order + torch.rand(s.batch_size, generator=generator, dtype=torch.float64)) / s.batch_size
        normal = torch.special.ndtri(u.clamp(1e-5, 1 - 1e-5))
        return torch.sigmoid(s.log_sigma_mean + s.log_sigma_std * normal).float().tolist()

    def _pieces(self, clips: list[tuple[int, Clip]]) -> list[list[tuple[int, Clip]]]:
        """Clips grouped by shape, at most a micro-batch in each group."""
        size, by_shape = self.recipe.schedule.micro_batch, dict[tuple[int, ...], list[tuple[int, Clip]]]()
        for item in clips:
            by_shape.setdefault(item[1].shape, []).append(item)
        return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]

    def _inputs(self, number: int, piece: list[tuple[int, Clip]]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and text of some clips, on the device; dropped captions become the negative prompt."""
        examples = [self.data.example(clip) for _, clip in piece]
        schedule = self.recipe.schedule
        places = [number * schedule.batch_size + i for i, _ in piece]
        texts = [
            self.data.negative_text() if _is_dropped(place, schedule.caption_dropout) else e.text
            for place, e in zip(places, examples, strict=True)
        ]
        noise = [
            torch.randn(clip.shape, generator=torch.Generator().manual_seed(_mix_seed(self.recipe.seed, 3, number, i)))
            for i, clip in piece
        ]
        stacks = ([e.latents for e in examples], noise, texts)
        x, n, text = (torch.stack(stack).to(self.team.device) for stack in stacks)
        return x, n, text

    def _patch(self) -> int:
        return math.prod(self.student.config.patch_size)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def _update_average(self, number: int) -> None:
        decay = min(MAX_DECAY, (1 + number) / (10 + number))
        parts = [local_shard(p.detach()) for p in self.named.values()]
        torch._foreach_lerp_(list(self.average.values()), parts, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the student has its averaged weights."""
        kept = {name: local_shard(p.detach()).clone() for name, p in self.named.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.named.items():
            local_shard(p.detach()).copy_(values[name])


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix between hidden states of a block, as Muon trains them, but not `proj_l`."""
    return parameter.ndim == 2 and ".blocks." in f".{name}" and parameter_group(name) is None


def optimizer_8bit() -> Any:
    """AdamW with 8-bit state. Raises EnvironmentProblem where bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise EnvironmentProblem(
            "--optimizer adamw8bit needs bitsandbytes. Install it: pip install 'slagen[adamw8bit]'"
        ) from error
    return AdamW8bit


def _is_dropped(place: int, fraction: float) -> bool:
    """Whether the caption at a position, from 0, in the sequence of all training clips is dropped; evenly spaced."""
    return math.floor((place + 1) * fraction) > math.floor(place * fraction)


def _mix_seed(*parts: int) -> int:
    """One seed from several numbers, the same on every machine (FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63
