"""Stage 2: render the training clips and encode them once, so that the transformer never waits for the VAE."""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path

import torch
from common import autocast, best_device, save_tensors
from diffusers import AutoencoderKLWan
from scenes import COLOURS, MOTIONS, SHAPES, is_held_out, render, sample_scene, training_scenes

CHUNK = 448


def held_out_scenes(count: int, seed: int):
    """Scenes of combinations that are never trained on, as evenly spread over them as `count` allows."""
    rng = random.Random(seed)
    combinations = [(c, s, m) for s in SHAPES for m in MOTIONS for c in COLOURS if is_held_out(c, s, m)]
    by_shape = {s: [x for x in combinations if x[1] == s] for s in SHAPES}
    for group in by_shape.values():
        rng.shuffle(group)
    picks = [by_shape[SHAPES[i % 4]][i // 4 % len(by_shape[SHAPES[i % 4]])] for i in range(count)]
    return [sample_scene(rng, *pick) for pick in picks]


def encode(vae: AutoencoderKLWan, scenes: list, device: torch.device, batch: int) -> torch.Tensor:
    """(N, C, 5, 16, 16) float16 posterior means, not normalised."""
    out = []
    with torch.inference_mode(), autocast(device):
        for i in range(0, len(scenes), batch):
            clips = render(scenes[i : i + batch], device=device)
            out.append(vae.encode(clips).latent_dist.mode().half().cpu())
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-wan"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = best_device()
    vae = AutoencoderKLWan.from_pretrained(args.work / "vae").to(device).eval()
    chunks = args.work / "clips"
    chunks.mkdir(exist_ok=True)
    scenes = training_scenes()
    random.Random(args.seed).shuffle(scenes)
    for start in range(0, len(scenes), CHUNK):
        path = chunks / f"{start:06d}.pt"
        if not path.exists():
            part = scenes[start : start + CHUNK]
            latents = encode(vae, part, device, 8 if device.type == "cpu" else 128)
            save_tensors(path, {"latents": latents, "scenes": [asdict(s) for s in part]})
            print(path.name, flush=True)
    held = held_out_scenes(128, args.seed + 1)
    save_tensors(
        args.work / "held_out.pt", {"latents": encode(vae, held, device, 8), "scenes": [asdict(s) for s in held]}
    )
    sample = torch.load(chunks / "000000.pt", weights_only=True)["latents"].float()
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    print("latent mean", mean, "std", std)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(args.work / "vae")


if __name__ == "__main__":
    main()
