"""Make weights/clips.gif, the README's picture: four prompts with the bundled model and one seed."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.video import read_mp4

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "a red circle moving right",
    "a cyan star growing on a navy background",
    "a blue square falling on a white background",
    "an orange triangle moving left on a gray background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "clips.gif")
    args = parser.parse_args()
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in args.prompts:
            config = GenerateConfig(prompt, model="tiny-wan", device="cpu", seed=args.seed, output=folder)
            clips.append(read_mp4(generate(config).videos[0].path))
    gap = np.full((*clips[0].shape[:2], 4, 3), 255, np.uint8)
    wide = np.concatenate([part for clip in clips for part in (gap, clip)][1:], axis=2)
    frames = [Image.fromarray(frame) for frame in wide]
    frames += [frames[-1]] * 4  # rest on the last frame before starting again
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=125, loop=0)
    print(args.out)


if __name__ == "__main__":
    main()
