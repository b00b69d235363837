"""Hashes of what a few tiny runs make, to be compared by hand before and after a change, on one machine:

    python tests/golden_latents.py > before.json     # at the commit before
    python tests/golden_latents.py before.json       # at the commit after: says what differs, exit code 1

Another machine rounds otherwise, so these are no golden copies for `make test`; they take about a minute.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slagen.formats.sla import read_sla, write_sla
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import tensor_hash
from slagen.generation.generate import generate
from slagen.io.reading import digest
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.finetune import finetune
from slagen.wan.folder import bundled_folder

RUNS: dict[str, dict[str, Any]] = {
    "sla": {}, "sla, reference": {"backend": "reference"}, "sla, blocks of 32": {"block_m": 32, "block_n": 32},
    "sla, sparsity 0.8": {"sparsity": 0.8}, "sla, topk 0.3": {"sla_topk": 0.3}, "sla, bf16": {"dtype": "bf16"},
    "sparse": {"attention": "sparse", "allow_untrained": True},
    "linear": {"attention": "linear", "allow_untrained": True},
    "dense": {"attention": "dense"}, "euler": {"sampler": "euler"}, "dpm++": {"sampler": "dpm++"},
    "no guidance": {"guidance_scale": 1.0}, "flow shift": {"flow_shift": 6.0},
    "another size": {"width": 96, "height": 64},
    "transformer file": {"weights": str(bundled_folder() / "transformer"), "attention": "dense"},
}  # fmt: skip


def latents_hash(folder: Path, settings: dict[str, Any]) -> str:
    """SHA-256 of the latents of one video, as its report tells it."""
    common = {"model": "tiny-wan", "steps": 2, "seed": 7, "device": "cpu", "output": str(folder / "a.mp4")}
    config = GenerateConfig("a red circle moving right", overwrite=True, **{**common, **settings})
    return generate(config).videos[0].report["latents_hash"]


def tuned_hash(folder: Path, **settings: Any) -> str:
    """A hash of the tensors that two steps of training write."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moving right --steps 1 --size 64x64 --num-frames 9\n", encoding="utf-8")
    data = DataConfig(None, str(prompts), 2)
    config = FinetuneConfig(
        data, model="tiny-wan", steps=2, batch_size=2, micro_batch=2, device="cpu", validate_every=1000,
        output=str(folder / "-".join(map(str, ["tuned", *settings.values()]))), **settings,
    )  # fmt: skip
    tensors = load_file(finetune(config).weights)
    return digest({name: tensor_hash(tensor) for name, tensor in tensors.items()})


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {run: latents_hash(folder, settings) for run, settings in RUNS.items()}
        metadata, tensors = read_sla(bundled_folder())
        write_sla(tensors, folder / "rcm.safetensors", dataclasses.replace(metadata, sampler_family="rcm"))
        found["rcm"] = latents_hash(folder, {"weights": str(folder / "rcm.safetensors")})
        found["rcm, ode"] = latents_hash(folder, {"weights": str(folder / "rcm.safetensors"), "ode": True})
        found["finetune"] = tuned_hash(folder, from_dense=True, sparsity=0.8)
        found["finetune, lora"] = tuned_hash(folder, train="lora")
        found["finetune, flow"] = tuned_hash(folder, loss="flow", train="attn")
        found["finetune, layers"] = tuned_hash(folder, layer_loss=0.5, train="proj")
    print(json.dumps(found, indent=1))
    if len(sys.argv) == 1:
        return 0
    before = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    other = [run for run in {**before, **found} if before.get(run) != found.get(run)]
    print(f"differs: {', '.join(other)}" if other else "all as before", file=sys.stderr)
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
