"""`--init-from mean`: before its first step, SLA's proj_l is fitted so that SLA gives what the method `mean` gives.

With the sparse branch O^s, the linear branch O^l and the output of `mean` attention Y, all of one layer on the dense
model's own q, k and v, the fit is the ridge regression

    W, b = argmin sum_t |Y_t - O^s_t - W O^l_t - b|^2 + r |W|^2        r = RIDGE x mean of the diagonal of sum O^l O^l^T

over the tokens t of all heads, which share W and b, in both passes of a few training clips at several noise levels. It
has one solution, in closed form, summed and solved in float64. `mean` attends to the same blocks exactly, so the fit
puts into the linear branch what `mean` adds for the others. Nothing else of the model changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slagen.attention.mean.config import MeanConfig
from slagen.attention.mean.functional import block_mean_attention
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.functional import sparse_linear_attention
from slagen.events import Event
from slagen.training.data.dataset import Dataset
from slagen.training.metrics import LEVELS, noise_levels, noisy_inputs, velocity
from slagen.training.models import Models
from slagen.training.setup import Setup
from slagen.wan.processor import follow, processors

MAX_CLIPS = 8  # the first ones of the training set
RIDGE = 1e-3


class Fit:
    """The sums that the regression of one layer needs, of any number of tokens.

    Args:
        head_dim: D. device: where the sums are.
    """

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self.xx = torch.zeros(head_dim + 1, head_dim + 1, dtype=torch.float64, device=device)  # of (O^l, 1)
        self.xy = torch.zeros(head_dim + 1, head_dim, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        self.scale = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, o_linear: Tensor, missing: Tensor, target: Tensor) -> None:
        """Count more tokens: O^l, Y - O^s and Y, each (..., D)."""
        x = torch.nn.functional.pad(o_linear.double().flatten(0, -2), (0, 1), value=1.0)
        y = missing.double().flatten(0, -2)
        self.xx += x.mT @ x
        self.xy += x.mT @ y
        self.yy += y.square().sum()
        self.scale += target.double().square().sum()

    def solve(self) -> tuple[Tensor, Tensor]:
        """W (D, D) as in `F.linear`, and b (D,), both float64."""
        penalty = RIDGE * self.xx.diagonal()[:-1].mean()
        ridge = torch.full_like(self.xx.diagonal(), float(penalty))
        ridge[-1] = 0.0  # the bias is free
        found = torch.linalg.solve(self.xx + ridge.diag(), self.xy)
        return found[:-1].mT.contiguous(), found[-1]

    def errors(self, weight: Tensor, bias: Tensor) -> tuple[float, float]:
        """The relative L2 error of SLA's output to Y: with proj_l zero, and with these."""
        w = torch.cat([weight.mT, bias[None]])
        left = self.yy - 2 * (w * self.xy).sum() + (w * (self.xx @ w)).sum()
        before, after = (float((each.clamp_min(0) / self.scale).sqrt()) for each in (self.yy, left))
        return before, after


def mean_of(config: SLAConfig) -> MeanConfig:
    """The config of `mean` that attends to the same blocks exactly as SLA does."""
    return MeanConfig(
        sparsity=config.sparsity, block_m=config.block_m, block_n=config.block_n, order=config.order,
        selector=config.selector,
    )  # fmt: skip


@torch.no_grad()
def add_layer(fit: Fit, layer: Any, config: SLAConfig, q: Tensor, k: Tensor, v: Tensor, grid: Any) -> None:
    """Count the tokens of a layer's q, k and v, (B, H, L, D), in its fit; computed in float32."""
    q, k, v = q.float(), k.float(), v.float()
    shared: dict[str, Any] = {"grid": grid, "seeds": layer.seeds, "backend": "torch"}
    target = block_mean_attention(q, k, v, mean_of(config), **shared)
    sparse = sparse_linear_attention(q, k, v, config, branches="sparse", **shared)
    unprojected = torch.eye(q.shape[3], device=q.device)
    o_linear = sparse_linear_attention(q, k, v, config, unprojected, branches="linear", **shared)
    fit.add(o_linear, target - sparse, target)


def fit_to_mean(setup: Setup, models: Models, data: Dataset) -> None:
    """Fit the proj_l of every layer of the student, and say by how much its output comes nearer to `mean`'s."""
    student, teacher, device = models.student, models.teacher, setup.team.device
    layers, schedule = processors(student), setup.schedule
    fits = [Fit(setup.weights.source.head_dim, device) for _ in layers]
    examples = [data.example(clip) for clip in data.training[:MAX_CLIPS]]
    levels = noise_levels(LEVELS, schedule.log_sigma_mean, schedule.log_sigma_std)

    def hook(index: int) -> Any:
        def add(module: Any, arguments: Any, output: Tensor) -> None:
            q, k, v, _ = arguments
            own = layers[index]
            add_layer(fits[index], own, own.config, q, k, v, own.context.grid)

        return add

    handles: list[Any] = [each.register_forward_hook(hook(i)) for i, each in enumerate(processors(teacher))]
    handles.append(follow(student, teacher))
    try:
        for noisy, level, text in noisy_inputs(examples, levels, device):
            with torch.no_grad(), torch.autocast(device.type, setup.recipe.dtype, setup.recipe.dtype != torch.float32):
                velocity(teacher, noisy, level, text)
    finally:
        for handle in handles:
            handle.remove()
    before = after = 0.0
    pairs = [(layer, fit) for layer, fit in zip(layers, fits, strict=True) if layer.config.sparsity > 0]
    for layer, fit in pairs:
        weight, bias = fit.solve()
        with torch.no_grad():
            layer.proj_l.weight.copy_(weight)
            layer.proj_l.bias.copy_(bias)
        each = fit.errors(weight, bias)
        before, after = before + each[0] / len(pairs), after + each[1] / len(pairs)
    setup.emit(Event("note", (
        f"proj_l starts from a fit to the method mean on {len(examples)} training clips, which lowers the average "
        f"error of SLA to that method from {before:.3g} to {after:.3g}"
    )))  # fmt: skip
