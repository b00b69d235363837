"""Measure prompt adherence on held-out prompts, with the same prompts and seeds for dense attention and SLA."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
from datetime import UTC, datetime
from pathlib import Path

import torch
from checker import check
from encode import held_out_scenes
from scenes import SHAPES, SIZES, Size, caption

from slagen.formats.sla import read_sla
from slagen.io.files import writing
from slagen.machine import DTYPES, describe_device
from slagen.packages import versions
from slagen.wan.install import apply_sla, load_sla, remove_sla
from slagen.wan.loading import load_pipeline
from slagen.wan.models import resolve_model
from slagen.wan.samplers import set_sampler
from slagen.wan.vae import decode_latents

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("dense", "critical only, untuned", "SLA tuned")
ATTRIBUTES = ("colour", "shape", "motion", "background", "all")


def prepare(pipe, row: str, weights: Path, sparsity: float | None) -> None:
    """Put a row's attention and weights into the pipeline."""
    remove_sla(pipe)
    if row == "dense":
        return
    metadata, _ = read_sla(weights)
    config = dataclasses.replace(metadata.config, sparsity=sparsity or metadata.config.sparsity)
    if row == "critical only, untuned":
        apply_sla(pipe, config, branches="sparse")
    else:
        load_sla(pipe, weights, config=config, allow_untrained=True)


def held_out(count: int, seed: int = 1000) -> tuple[list, list[str], list[int]]:
    """Scenes of combinations that were never trained on, their captions, and a seed for each."""
    scenes, rng = held_out_scenes(count, 2), random.Random(5)
    return scenes, [caption(scene, rng) for scene in scenes], [seed + i for i in range(count)]


@torch.inference_mode()
def sample(
    pipe, prompts: list[str], seeds: list[int], defaults, steps: int, size: Size = SIZES[0], kept: Path | None = None
) -> torch.Tensor:
    """Final latents (N, C, T, h, w), in batches; every clip has its own generator, as in `slagen generate`.

    With a folder `kept`, each batch is written there and read instead of made again.
    """
    out, batch = [], max(1, 1280 // size.tokens)
    for i in range(0, len(prompts), batch):
        count = len(prompts[i : i + batch])
        path = kept and kept / f"{i}-{i + count}.pt"
        if path and path.exists():
            out.append(torch.load(path))
            continue
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        out.append(
            pipe(
                prompt=prompts[i : i + batch], height=size.side, width=size.side, num_frames=size.frames,
                num_inference_steps=steps, guidance_scale=defaults.guidance_scale, generator=generators,
                max_sequence_length=defaults.max_sequence_length, output_type="latent",
            ).frames.float()
        )  # fmt: skip
        if path:
            with writing(path) as part:
                torch.save(out[-1], part)
    return torch.cat(out)


def place(folder: Path, settings: list[object], weights: list[Path]) -> Path:
    """A folder for the latents of one row, named by its settings and the contents of its weights."""
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    found = folder / hashlib.sha256(json.dumps([settings, contents]).encode()).hexdigest()[:16]
    found.mkdir(parents=True, exist_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "weights" / "tiny-wan"))
    parser.add_argument("--weights", type=Path, help="SLA weights to evaluate in place of the model's own")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--size", choices=[str(size) for size in SIZES], default=str(SIZES[0]))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for latents, with which a run that was stopped goes on")
    parser.add_argument("--frames", type=Path, help="save each row's clips as a .pt file in this folder")
    args = parser.parse_args()
    if args.clips < len(SHAPES):
        parser.error(f"--clips is {args.clips}, but each of the {len(SHAPES)} shapes needs one. Try --clips 4.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model(args.model, device.type)
    steps = args.steps or source.defaults.steps
    scenes, prompts, seeds = held_out(args.clips, args.seed)
    size = next(size for size in SIZES if str(size) == args.size)
    results, dense = [], None
    for row in args.rows:
        pipe = load_pipeline(source, DTYPES[args.dtype]).to(device)
        set_sampler(pipe, source.defaults.sampler, source.defaults.flow_shift)
        prepare(pipe, row, args.weights or source.folder, args.sparsity)
        kept = None
        if args.keep:
            weights = [Path(source.folder) / "transformer" / "diffusion_pytorch_model.safetensors"]
            weights += [] if row == "dense" else [args.weights or Path(source.folder) / "sla.safetensors"]
            settings = [row, args.size, args.dtype, steps, args.sparsity, args.seed]
            kept = place(args.keep, settings, weights)
        latents = sample(pipe, prompts, seeds, source.defaults, steps, size, kept)
        dense = latents if row == "dense" else dense
        with torch.inference_mode():
            clips = [decode_latents(pipe.vae, z[None]) for z in latents]
        if args.frames:
            args.frames.mkdir(parents=True, exist_ok=True)
            torch.save({"prompts": prompts, "clips": torch.stack(clips)}, args.frames / f"{row.replace(' ', '-')}.pt")
        verdicts = [check(clip.numpy()) for clip in clips]
        right = [v.right(s) for v, s in zip(verdicts, scenes, strict=True)]
        shapes = {
            shape: sum(r["shape"] for r, s in zip(right, scenes, strict=True) if s.shape == shape)
            / sum(s.shape == shape for s in scenes)
            for shape in SHAPES
        }
        round_ones = [v.roundness for v, s in zip(verdicts, scenes, strict=True) if s.shape == "circle" and v.roundness]
        result = {
            "row": row, "clips": len(clips), **{a: sum(r[a] for r in right) / len(right) for a in ATTRIBUTES},
            "by_shape": shapes, "template_overlap": sum(v.overlap for v in verdicts) / len(verdicts),
            "roundness_of_circles": sum(round_ones) / len(round_ones) if round_ones else None,
            "error_to_dense": None if dense is None else ((latents - dense).norm() / dense.norm()).item(),
        }  # fmt: skip
        results.append(result)
        print(json.dumps(result), flush=True)
        for prompt, verdict, r in zip(prompts, verdicts, right, strict=True):
            if not r["all"]:
                print(f"  {prompt}: {verdict}", flush=True)
    print_table(results)
    if args.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": describe_device(device).to_dict(),
            "versions": versions(),
            "size": args.size,
            "steps": steps,
            "dtype": args.dtype,
            "seeds": [seeds[0], seeds[-1]],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "rows": results}, indent=2) + "\n")


def print_table(results: list[dict]) -> None:
    """The rows as Markdown, rates in percent."""
    print(
        "\n| row | clips | " + " | ".join(ATTRIBUTES) + " | " + " | ".join(SHAPES) + " | IoU | round | error to dense |"
    )
    print("|" + " --- |" * (5 + len(ATTRIBUTES) + len(SHAPES)))
    for r in results:
        error = "" if r["error_to_dense"] is None else f"{r['error_to_dense']:.3f}"
        roundness = "" if r["roundness_of_circles"] is None else f"{r['roundness_of_circles']:.2f}"
        rates = [f"{r[a]:.0%}" for a in ATTRIBUTES] + [f"{r['by_shape'][s]:.0%}" for s in SHAPES]
        print(
            f"| {r['row']} | {r['clips']} | {' | '.join(rates)} | {r['template_overlap']:.2f} | {roundness} | {error} |"
        )


if __name__ == "__main__":
    main()
