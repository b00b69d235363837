"""Settings of a tiny training, what it left in its output folder, and runs whose pictures cost nothing."""

import contextlib

import numpy as np
import pytest
import torch

from slagen.attention.registry import parameter_group
from slagen.cli.main import run
from slagen.formats.sla import read_sla
from slagen.training import comparison, page
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.log import StepRecord, ValidationRecord, read_log
from slagen.wan.folder import describe_folder
from slagen.wan.transformer import load_transformer

PROMPTS = "a red circle --steps 1 --size 64x64 --frames 9\na circle --steps 1 --size 64x64 --frames 5\n"


@contextlib.contextmanager
def without_pictures():
    """Keep the clips of runs as arrays, and leave charts and thumbnails empty."""

    def keep(frames, path, fps, comment=""):
        with path.open("wb") as file:
            np.save(file, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "write_video", keep)
        patch.setattr(comparison, "read_mp4", np.load)
        patch.setattr(page, "read_mp4", np.load)
        patch.setattr(page, "encode_video", lambda frames, path, fps: None)
        patch.setattr(page, "draw_chart", lambda chart: "<svg></svg>")
        patch.setattr(page, "make_thumbnail", lambda path, width: b"")
        yield


def run_without_pictures(arguments):
    """The command, for a process that no fixture reaches."""
    with without_pictures():
        return run(arguments)


def settings(model, output, *, data=None, self_generate=None, **fields):
    count = None if self_generate is None else 3
    source = DataConfig(None if data is None else str(data), self_generate and str(self_generate), count)
    fields = {"from_dense": True, "sparsity": 0.6, "block_m": 16, "block_n": 16, "device": "cpu",
              "validate_every": 1000, **fields}  # fmt: skip
    return FinetuneConfig(source, model=str(model), output=str(output), **fields)


def steps_of(folder):
    return [record for record in read_log(folder) if isinstance(record, StepRecord)]


def validations_of(folder):
    return [record for record in read_log(folder) if isinstance(record, ValidationRecord)]


def weights(folder):
    return read_sla(folder)[1]


def changed(folder, model):
    """The names of what differs from the dense model, by kind."""
    base = load_transformer(describe_folder(model, "toy"), torch.float32).state_dict()
    tensors = weights(folder)
    kinds = {"proj": False, "attn": False, "rest": False}
    for name, tensor in tensors.items():
        if parameter_group(name) is not None:
            kinds["proj"] |= bool(tensor.any())
        elif ".lora_" not in name and not torch.equal(tensor.float(), base[name].half().float()):
            kinds["attn" if ".attn1." in name else "rest"] = True
    return {kind for kind, differs in kinds.items() if differs}
