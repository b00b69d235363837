"""Measure how similar the critical key blocks of neighbouring query blocks are, on q and k of the bundled model.

    python benchmarks/neighbour_overlap.py --size 256x256x33

A kernel could process two neighbouring query blocks as one tile, over the union of their critical key blocks. It would
load each key block once for both, but also multiply it with rows that did not select it. That is worthwhile if the
union is only a little longer than one list. This script prints the ratio of the two lengths: 1 if neighbours select the
same key blocks, and 2 if they have none in common. It does so for tokens in raster order and in cubes of 4 x 4 x 4.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from slagen.attention.protocol import Inputs
from slagen.attention.sla.block_map import block_scores, critical_indices
from slagen.attention.sla.config import SLAConfig
from slagen.io.files import write_json
from slagen.machine import cpu_name
from slagen.wan.loading import load_pipeline
from slagen.wan.models import resolve_model
from slagen.wan.processor import install, processors

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256x256x33", help="width x height x frames (default: 256x256x33)")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps with dense attention (default: 4)")
    parser.add_argument("--json", type=Path, help="file to write (default: a new file in benchmarks/results)")
    args = parser.parse_args()
    width, height, num_frames = map(int, args.size.split("x"))
    grid = (num_frames - 1) // 4 + 1, height // 16, width // 16  # of tokens: 8x in the VAE, patches of 2 x 2
    orders = {"raster": torch.arange(grid[0] * grid[1] * grid[2]), "cube": cubes(grid)}
    ratios: dict[tuple[str, int, float], list[float]] = {}

    def note(q: Tensor, k: Tensor) -> None:
        for order, tokens in orders.items():
            for block in (16, 32, 64):
                for sparsity in (0.9, 0.95):
                    config = SLAConfig(sparsity, block_m=block, block_n=block)
                    ratio = union_ratio(q[:, :, tokens], k[:, :, tokens], config)
                    ratios.setdefault((order, block, sparsity), []).append(ratio)

    pipe = load_pipeline(resolve_model("tiny-wan", "cpu"), torch.float32)
    install(pipe.transformer, None)
    for processor in processors(pipe.transformer):
        attend = processor._operator

        def noted(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, attend=attend) -> Tensor:
            note(q, k)
            return attend(q, k, v, inputs)

        processor._operator = noted
    with torch.inference_mode():
        pipe(
            args.prompt, width=width, height=height, num_frames=num_frames, num_inference_steps=args.steps,
            guidance_scale=1.0, max_sequence_length=32, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    rows = []
    for (order, block, sparsity), values in ratios.items():
        found = torch.tensor(values)
        rows.append({
            "order": order, "block": block, "sparsity": sparsity, "union_over_list": round(found.mean().item(), 3),
            "least": round(found.min().item(), 3), "most": round(found.max().item(), 3),
        })  # fmt: skip
        print(rows[-1])
    date = datetime.now(UTC)
    about = {
        "model": "tiny-wan", "size": args.size, "tokens": grid[0] * grid[1] * grid[2], "steps": args.steps,
        "machine": cpu_name(), "torch": torch.__version__, "date": date.isoformat(timespec="seconds"),
    }  # fmt: skip
    path = args.json or RESULTS / f"neighbour-overlap-{date:%Y-%m-%d}.json"
    write_json(path, {**about, "rows": rows})
    print(json.dumps(about))


def cubes(grid: tuple[int, int, int]) -> Tensor:
    """Tokens of a (T, H, W) grid in cubes of 4 x 4 x 4, in raster order inside and among them."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = 0
    for part in (t // 4, h // 4, w // 4, t % 4, h % 4, w % 4):
        key = key * (max(grid) + 1) + part
    return key.flatten().argsort()


def union_ratio(q: Tensor, k: Tensor, config: SLAConfig) -> float:
    """Mean length of the union of two neighbours' lists, in lengths of one list."""
    scores = block_scores(q, k, config)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, critical_indices(scores, config), True)
    pairs = kept[:, :, : kept.shape[2] // 2 * 2].unflatten(2, (-1, 2))
    return (pairs.any(3).sum(-1) / pairs[..., 0, :].sum(-1)).mean().item()


if __name__ == "__main__":
    main()
