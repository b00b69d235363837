"""`slagen finetune --attention vsa`: the gate of the coarse branch starts at zero, learns, and is in the file."""

import pytest
from finetune_runs import settings

from slagen.attention.vsa.config import VSAConfig
from slagen.formats.sla import read_sla
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.training.finetune import finetune

pytest_plugins = ["finetune_fixtures"]
pytestmark = pytest.mark.slow


def test_the_gate_is_trained_and_runs(toy, tmp_path):
    model, data = toy
    fields = {"attention": "vsa", "sparsity": 0.5, "block_m": None, "block_n": None, "steps": 2, "train": "proj"}
    finetune(settings(model, tmp_path / "out", data=data, **fields))
    metadata, tensors = read_sla(tmp_path / "out")
    assert (metadata.method, metadata.config) == ("vsa", VSAConfig(0.5, gate=True))
    gates = [name for name in tensors if name.endswith("to_gate_compress.weight")]
    assert gates and all(tensors[name].any() for name in gates)
    report = generate(
        GenerateConfig(
            "a red circle", model=str(model), weights=str(tmp_path / "out"), attention="vsa", width=64, height=64,
            num_frames=9, steps=1, seed=1, device="cpu", output=str(tmp_path / "a.mp4"),
        )
    ).videos[0].report  # fmt: skip
    assert report["weights"]["used"] == "vsa attention" and report["attention"]["gate"] is True
    assert len(report["weights"]["parameter_norms"]["to_gate_compress"]) == len(gates)
