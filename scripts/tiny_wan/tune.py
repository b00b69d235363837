"""Stage 5: train SLA weights for the exported model with `slagen finetune` on rendered videos.

    python scripts/tiny_wan/tune.py                                       from the dense model
    python scripts/tiny_wan/tune.py --on before.safetensors --lr 3e-4     from SLA weights

The weights are written into the model's folder. All other options are passed to slagen finetune. Run the same command
again to resume.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path

from scenes import FPS, SIZES, Size, caption, render, training_scenes

from slagen.video import write_video

ROOT = Path(__file__).resolve().parents[2]
NUM_VIDEOS = dict(zip(SIZES, (144, 64, 64), strict=True))  # of each size; what is longer weighs more in a step
MORE_VIDEOS = {  # of the shapes that sparse attention loses first
    "star": dict(zip(SIZES, (32, 24, 64), strict=True)),
    "triangle": dict(zip(SIZES, (0, 0, 24), strict=True)),
}


def prepare_data(
    work: Path, model: Path, num_videos: dict[Size, int] = NUM_VIDEOS, more: dict[str, dict[Size, int]] | None = None
) -> Path:
    """Scenes of each size as videos with captions, encoded by `slagen finetune data`, which keeps what is there.

    Args:
        num_videos: of each size, of any shape. more: besides, by shape.
    """
    rng = random.Random(7)
    scenes = training_scenes()
    rng.shuffle(scenes)
    folder = work / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(zip(scenes, [size for size, count in num_videos.items() for _ in range(count)], strict=False))
    for shape, counts in (more or {}).items():
        others = [scene for scene in scenes[len(chosen) :] if scene.shape == shape]
        chosen += zip(others, [size for size, count in counts.items() for _ in range(count)], strict=False)
    for i, (scene, size) in enumerate(chosen):
        text = caption(scene, rng)
        path = folder / f"{i:04d}.mp4"
        if not path.exists():
            clip = render([scene], num_frames=size.frames, size=size.side)[0]
            frames = (clip.permute(1, 2, 3, 0) + 1).mul(127.5).round().byte().numpy()
            write_video(frames, path, FPS)
        path.with_suffix(".txt").write_text(text + "\n")
    largest = max(num_videos, key=lambda size: size.tokens)
    slagen("finetune", "data", str(folder), "--output", str(work / "data"), "--model", str(model), "--no-upscale",
           "--size", f"{largest.side}x{largest.side}", "--num-frames", str(largest.frames))  # fmt: skip
    return work / "data"


def slagen(*arguments: str) -> str:
    """One command of slagen's; returns what it printed on stdout."""
    command = [sys.executable, "-m", "slagen", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny-wan")
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "tiny-wan")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--on", type=Path, help="SLA weights to start from: a copy, as the model's are replaced")
    parser.add_argument("--dtype", default="bf16", help="compute dtype (default: bf16)")
    args, more = parser.parse_known_args()
    data = prepare_data(args.work, args.model, more=MORE_VIDEOS)
    output = args.work / ("tuned-on" if args.on else "tuned")
    start = ["--weights", str(args.on.resolve())] if args.on else ["--from-dense"]
    slagen("finetune", "--model", str(args.model), "--data", str(data), "--sparsity", "0.95", "--order",
           "cube", "--optimizer", "muon", "--caption-dropout", "0.35", "--batch-size", "2", "--steps", str(args.steps),
           "--dtype", args.dtype, "--output", str(output), *start, *more)  # fmt: skip
    shutil.copy(output / "sla.safetensors", args.model)


if __name__ == "__main__":
    main()
