"""Fixtures of the tests of training: a tiny model with a prepared data set, and pictures that cost nothing."""

import contextlib
import json

import pytest
import torch
from finetune_runs import PROMPTS, settings, without_pictures
from wan_models import build_pipeline

from slagen.training.finetune import finetune


@pytest.fixture
def plain_pictures(request):
    """ffmpeg and matplotlib take two thirds of a run this small, so they are left out, but for the tests that ask for
    `true_pictures`."""
    with contextlib.nullcontext() if "true_pictures" in request.fixturenames else without_pictures():
        yield


@pytest.fixture(scope="module")
def plain_pictures_in_module():
    """`plain_pictures` for the fixtures of a module too."""
    with without_pictures():
        yield


@pytest.fixture
def true_pictures():
    """That the clips of a run are videos and its curves drawn."""


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A tiny random Wan, and clips that it made itself, prepared."""
    folder = tmp_path_factory.mktemp("toy")
    pipe = build_pipeline()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.norm_q.weight.mul_(8)  # peaks, so that it matters which blocks are kept
    pipe.save_pretrained(model := folder / "model")
    training = {"steps": 12, "lr": 1e-3, "batch_size": 4, "micro_batch": 4, "proj_multiplier": 2.0}
    defaults = {"steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8, "fps": 8, "training": training,
                "width": 64, "height": 64, "num_frames": 9}  # fmt: skip
    (model / "slagen.json").write_text(json.dumps(defaults))
    (folder / "prompts.txt").write_text(PROMPTS)
    first = finetune(settings(model, folder / "made", steps=1, self_generate=folder / "prompts.txt"))
    assert first.steps == 1
    return model, folder / "made" / "data"
