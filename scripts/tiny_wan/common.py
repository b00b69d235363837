"""What every stage needs: device, mixed precision, resumable state, a log line."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; without them it takes 16 times as long as float32."""
    host = torch.cpu.get_capabilities()
    return device.type == "cuda" or host.get("avx512_bf16", False) or host.get("amx_bf16", False)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where the processor has instructions for it, otherwise float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def save_state(path: Path, parts: dict, **scalars) -> None:
    """Write a resumable state; a killed run leaves the previous one."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save({"parts": {k: v.state_dict() for k, v in parts.items()}, "scalars": scalars}, part)
    os.replace(part, path)


def load_state(path: Path, parts: dict) -> dict:
    """Fill `parts` from a saved state and return its scalars; an empty dict when there is none."""
    if not path.exists():
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return state["scalars"]


def log(step: int, spent: float, **values: float) -> None:
    print(f"step {step} {spent:.0f}s " + " ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def save_tensors(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(content, part)
    os.replace(part, path)


def sigmas(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Stratified logit-normal noise levels in (0, 1), shifted towards noise as the sampler's are."""
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    t = torch.sigmoid(1.2 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    return shift * t / (1 + (shift - 1) * t)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon as make_optimizers sets it, but for float32 on some CPUs, and all matrices of one shape at once.

    PyTorch's own orthogonalises in bfloat16, which on a CPU without instructions for it takes 24 seconds for this
    model's matrices, ten times the rest of a training step; this takes 0.6.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float):
        super().__init__(matrices, dict(lr=lr, momentum=0.95, weight_decay=0.01))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = dict[torch.Size, list[torch.nn.Parameter]]()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))
                directions = orthogonal(torch.stack(updates)) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(directions.to(parameters[0].dtype)), alpha=-group["lr"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices to x (N, rows, columns) with all singular values about 1, by five Newton-Schulz steps."""
    x = x.bfloat16() if has_bfloat16(x.device) else x.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model, lr: float, extra: list):
    """Muon for the matrices inside blocks, AdamW for the rest and what is `extra`."""
    matrices, rest = [], list(extra)
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    muon = Muon(matrices, lr)
    adam = torch.optim.AdamW(rest, lr=lr * 0.5, betas=(0.9, 0.99), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return muon, adam


class Ema:
    """Exponential moving average of the parameters of several modules."""

    def __init__(self, modules: list, decay: float):
        self.parameters = [p for m in modules for p in m.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.average, self.parameters, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def applied(self):
        """Swap the averages in for the length of the block."""
        with torch.no_grad():
            kept = [p.detach().clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict:
        return {str(i): a for i, a in enumerate(self.average)}

    def load_state_dict(self, state: dict) -> None:
        self.average = [state[str(i)].to(p.device) for i, p in enumerate(self.parameters)]
