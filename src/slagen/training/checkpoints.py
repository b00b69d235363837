"""Checkpoints of a training: weights, averaged weights and optimizer state, written completely or not at all.

Each is a folder `step-000100` with `state.safetensors`, `state.json` and their hashes. The last two are kept; one whose
hashes do not match its files is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from slagen.errors import SlagenError, WeightsError
from slagen.io import forms
from slagen.io.documents import read_json
from slagen.io.files import delete, writing
from slagen.io.reading import file_hash
from slagen.packages import versions
from slagen.training.distributed import as_sharded, full_tensor, local_shard
from slagen.training.metrics import TeacherErrors
from slagen.training.trainer import Trainer

FOLDER = "checkpoints"
KEPT = 2
HASHES = "sha256.json"


MAX_STATE = 256 * 2**20
STATE = {  # what `save_state` keeps beside the tensors
    "step": forms.whole(0, 10**9), "seconds": float, "plain": {str: {str: object}}, "settings": {"data_options?": dict},
    "before": {"error": float, "layers": [float]},
}  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """How far a run has come, and how it started.

    Args:
        step: the last one made. seconds: of training so far.
        before: the errors before the first step. settings: all that changes what is learnt.
    """

    step: int
    seconds: float
    before: TeacherErrors
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {**vars(self), "before": self.before.to_dict()}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk.

    Args:
        plain: the optimizer's state that is not a tensor, by parameter.
    """

    path: Path
    state: RunState
    plain: dict[str, dict[str, Any]]


def save_state(trainer: Trainer, folder: Path, run: RunState) -> None:
    """Write a checkpoint. Every process calls it; the first one writes.

    Raises: SlagenError where the disk is full; earlier checkpoints are kept.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=trainer.team.size > 1, ignore_frozen_params=True)
    state: Any = get_state_dict(trainer.student, trainer.optimizers, options=options)
    weights, optimizer = state
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    plain: dict[str, dict[str, Any]] = {}
    for name, entries in optimizer.get("state", {}).items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    for name, kept in trainer.average.items():  # one at a time: all together may not fit on the GPU
        average = full_tensor(as_sharded(kept, trainer.named[name].detach()))
        if trainer.team.first:
            tensors[f"average/{name}"] = average.cpu()
    if not trainer.team.first:
        return
    final = folder / FOLDER / f"step-{run.step:06d}"
    try:
        final.parent.mkdir(exist_ok=True)
        with writing(final) as part:
            part.mkdir()
            save_file(_apart(tensors), part / "state.safetensors")
            content = {**run.to_dict(), "versions": versions(), "plain": plain}
            (part / "state.json").write_text(json.dumps(content, allow_nan=False))
            (part / HASHES).write_text(json.dumps(_hashes(part)))
    except (OSError, SafetensorError) as error:
        raise SlagenError(
            f"the checkpoint of step {run.step} could not be written to {folder} ({error}). Free some space and run "
            "again to resume from the previous checkpoint."
        ) from error
    found = checkpoints(folder)
    last = found.index(final) + 1  # later ones are corrupt, or the run would have resumed from them
    for old in found[: max(0, last - KEPT)] + found[last:]:
        with suppress(OSError):  # it is tried again after the next checkpoint
            delete(old)


def read_latest(folder: Path) -> Checkpoint | None:
    """The last complete checkpoint of a run; None where there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            if read_json(path / HASHES, {str: str}) == _hashes(path):
                content = read_json(path / "state.json", STATE, most=MAX_STATE)
                before = TeacherErrors(content["before"]["error"], content["before"]["layers"])
                state = RunState(content["step"], content["seconds"], before, content["settings"])
                return Checkpoint(path, state, content["plain"])
        except (OSError, WeightsError):  # it is not complete
            continue
    return None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU without shared memory, which bitsandbytes' tables have."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return kept


def _flat(entries: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """An optimiser's state of a parameter without dicts in it, which bitsandbytes has: their keys joined by slashes."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


def _nested(entries: dict[str, Any]) -> dict[str, Any]:
    """The same with its dicts again."""
    found: dict[str, Any] = {}
    for key, value in entries.items():
        *path, last = key.split("/")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's two files."""
    return {name: file_hash(path / name) for name in ("state.json", "state.safetensors")}


def load_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a trainer. Raises WeightsError if it is of another model."""
    path = checkpoint.path
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is corrupt ({error}). Delete it to resume from the previous checkpoint.") from error
    expected = {f"{kind}/{name}" for name in trainer.named for kind in ("weights", "average")}
    if expected != {name for name in tensors if not name.startswith("optimizer/")}:
        raise WeightsError(
            f"{path} is a checkpoint of a different model, or of a run that trained different parameters. Start again "
            "with --restart."
        )
    flat: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in checkpoint.plain.items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            parameter, key = name.removeprefix("optimizer/").split("/", 1)
            # a copy: a mapped file keeps its disk space after it is deleted
            flat.setdefault(parameter, {})[key] = tensor.clone()
    state: dict[str, Any] = {name: _nested(entries) for name, entries in flat.items()}
    weights: dict[str, Any] = {
        name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")
    }
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    in_parts = StateDictOptions(ignore_frozen_params=True)  # no full tensors are gathered only to read the groups
    groups = get_state_dict(trainer.student, trainer.optimizers, options=in_parts)[1]["param_groups"]
    set_state_dict(
        trainer.student, trainer.optimizers, model_state_dict=weights,
        optim_state_dict={"state": state, "param_groups": groups}, options=options,
    )  # fmt: skip
    if trainer.recipe.router_steps:  # what no stage has trained yet was given the state of a step without gradients
        for untrained in trainer.named.keys() - state.keys():
            for optimizer in trainer.optimizers:
                optimizer.state.pop(trainer.named[untrained], None)
    with torch.no_grad():
        for name, average in trainer.average.items():
            average.copy_(_shard_of(tensors[f"average/{name}"], trainer.named[name].detach()))


def _shard_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor, sharded as a parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return local_shard(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))


def checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, the last one last."""
    found = (
        path
        for path in (folder / FOLDER).glob("step-*")
        if path.is_dir() and re.fullmatch("[0-9]{1,12}", path.name[5:])
    )
    return sorted(found, key=lambda path: int(path.name[5:]))
