"""The processes that torchrun started for one command: how they join, talk to each other, and fail with one message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from slagen.errors import FAILED_IN, EnvironmentProblem, PeerFailed, SlagenError
from slagen.io.text import counted

TIMEOUT = timedelta(days=1)  # the others wait while the first prepares data, or writes
ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # says gloo of a peer that is gone
Said = TypeVar("Said")


@dataclass(frozen=True)
class Member:
    """This process among those that run one command.

    Args:
        rank: of this process; 0 is the first, which writes files. size: number of processes.
        device: this process's own.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes (a barrier)."""
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        said = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def told(self, value: Said | None) -> Said:
        """What the first process gives, in every process; the value of the others does not count."""
        box: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def collected(self, value: Said) -> list[Said]:
        """What each process gives, by rank, in every process."""
        box: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value)
        return box


@contextmanager
def joined(device: torch.device) -> Iterator[Member]:
    """Join the processes that torchrun started, for the length of the block; without torchrun this one is alone.

    Of several processes that fail, the first to do so raises its own error; the others raise PeerFailed.

    Args:
        device: the requested one; on CUDA each process takes the GPU of its local rank.
    Raises: EnvironmentProblem where the processes cannot connect, or there are more of them than GPUs on this machine.
    """
    if not dist.is_torchelastic_launched():
        yield Member(0, 1, device)
        return
    if device.type == "cuda":
        _check_cards()
    store = _connect("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank(0))
        torch.cuda.set_device(device)
    rank = dist.get_rank()
    try:
        yield Member(rank, dist.get_world_size(), device)
    except KeyboardInterrupt:  # torchrun ends the others so, where one has failed
        if rank == 0 and not _fails_first(store):
            raise PeerFailed from None
        raise
    except Exception as error:
        if not _fails_first(store):
            raise PeerFailed from error
        failure = _said_of(error)
        if rank:
            failure.add_note(f"{FAILED_IN}{rank}")
        raise failure from (None if failure is error else error)
    if store is not None:  # after a failure the process ends, and waiting for the others might take forever
        dist.destroy_process_group()


def _connect(backend: str) -> dist.Store | None:
    """Connect to the other processes. Returns where they keep notes for each other; None if they are connected already,
    by whoever calls slagen."""
    if dist.is_initialized():
        return None
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"the processes that torchrun started cannot connect to each other: {error}"
        ) from error
    return store


def _said_of(error: Exception) -> Exception:
    """The error itself, or where it is about the connection what has become of the other process."""
    if isinstance(error, dist.DistError) or any(words in str(error) for words in ENDED):
        return SlagenError(
            "another process of this run ended without a message. The system may have ended it for lack of memory."
        )
    return error


def _fails_first(store: dist.Store | None) -> bool:
    """Whether no other process has failed before this one, which fails now."""
    if store is None:
        return True
    try:
        return store.add("slagen/failed", 1) == 1  # type: ignore[no-any-return]
    except RuntimeError:  # it was in a process that has ended
        return False


def _check_cards() -> None:
    """Raise EnvironmentProblem, in every process, where torchrun started more of them here than there are GPUs."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_node_local_rank(0) + 1))
    cards = torch.cuda.device_count()
    if started > cards:
        raise EnvironmentProblem(
            f"torchrun started {counted(started, 'process')} on this machine, and each needs its own GPU, but PyTorch "
            f"sees {counted(cards, 'CUDA device')}. Try torchrun --nproc-per-node {cards}."
        )
