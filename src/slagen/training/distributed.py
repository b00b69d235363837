"""The processes that train together under torchrun, and how they share a model: DDP, FSDP2, context parallelism.

A single process is a team of one, without a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from slagen.errors import UsageError
from slagen.processes import Member, joined
from slagen.training.config import Parallel


@dataclass(frozen=True)
class Team(Member):
    """This process's place among those that train together.

    Args:
        kind: "alone", "ddp" or "fsdp".
        context: number of consecutive ranks that share the tokens of a clip. context_group: their process group, where
            there are several.
    """

    kind: str
    context: int = 1
    context_group: Any = None

    @property
    def data_rank(self) -> int:
        """Index of the part of a batch that this process trains on."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """Number of parts that a batch is divided into."""
        return self.size // self.context

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def over_context(self, values: Tensor) -> Tensor:
        """The sum over the processes that share a clip."""
        values = values.clone()
        dist.all_reduce(values, group=self.context_group)
        return values

    def share(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The module to call for training together: wrapped in DDP, or with "fsdp" sharded in place.

        Args:
            module: on its device; for "fsdp" anywhere, as it is moved block by block.
            dtype: of the computation; gradients are summed in float32.
        """
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            lower = None if dtype == torch.float32 else dtype
            inside = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
            self._split(module, inside, MixedPrecisionPolicy(reduce_dtype=torch.float32))
        return module

    def share_frozen(self, module: nn.Module) -> nn.Module:
        """A frozen module on this process's device, with "fsdp" sharded over the processes."""
        if self.kind == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
            self._split(module, policy, policy)
            return module
        return module.to(self.device)

    @contextmanager
    def syncing(self, shared: nn.Module, last: bool) -> Iterator[None]:
        """Around a backward pass: with DDP, gradients are summed over the processes in the last pass of a step only.

        With FSDP they are in each pass, because the unsharded gradients of all passes would not fit on a GPU.
        """
        if self.kind == "ddp" and not last:
            with shared.no_sync():  # type: ignore[operator]
                yield
            return
        yield

    def _split(self, module: nn.Module, inside: Any, around: Any) -> None:
        """Shard with FSDP2, block by block. The root is resharded too, or it would compute with outdated copies."""
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in cast(nn.ModuleList, module.blocks):
            fully_shard(block, mesh=mesh, mp_policy=inside, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, mp_policy=around, reshard_after_forward=True)


@contextmanager
def join(device: torch.device, parallel: Parallel, context: int = 1) -> Iterator[Team]:
    """Join the processes that torchrun started to train together, for the length of the block.

    Args:
        device: the requested one.
        context: number of processes that share the tokens of a clip.
    Raises: UsageError for options of several processes without torchrun; as `joined`.
    """
    alone = not dist.is_torchelastic_launched()
    if alone and (parallel != "auto" or context > 1):
        option = f"--context-parallel {context}" if context > 1 else f"--parallel {parallel}"
        raise UsageError(f"{option} needs several processes. Start them with torchrun --nproc-per-node 2 -m slagen ...")
    with joined(device) as member:
        rank, size = member.rank, member.size
        if size % context:
            raise UsageError(f"context_parallel is {context}, but must divide the number of processes, {size}.")
        groups = [dist.new_group(range(i, i + context)) for i in range(0, size, context)] if context > 1 else None
        own = None if groups is None else groups[rank // context]
        kind = "alone" if alone else "fsdp" if parallel == "fsdp" else "ddp"
        yield Team(rank, size, member.device, kind, context, own)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over the team, gathered on every process."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; it shares its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(part: Tensor, other: Tensor) -> Tensor:
    """A local shard as a sharded tensor with the mesh, placements and shape of another."""
    from torch.distributed.tensor import DTensor

    if not isinstance(other, DTensor):
        return part
    kept: Any = DTensor.from_local(part, other.device_mesh, other.placements, shape=other.shape, stride=other.stride())
    return kept
