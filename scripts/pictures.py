"""Make the pictures of the README and of docs/ with the bundled model: clips, dense beside SLA, and block maps."""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from slagen.video import read_mp4

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a red circle moving right",
    "a cyan star growing on a navy background",
    "a blue square falling on a white background",
    "an orange triangle moving left on a gray background",
)
LARGE = ("--size", "256x256", "--num-frames", "33")
BLOCKS = ("--block-m", "16", "--block-n", "16")
MAPS = {"sla": (), "mean": BLOCKS, "sol": BLOCKS, "vsa": (), "radial": BLOCKS, "nabla": ("--sliding-tile", "none")}


def clips(folder: Path, seed: int, _: Path | None) -> None:
    """weights/clips.gif: four prompts at the default size."""
    for i, prompt in enumerate(PROMPTS):
        slagen("generate", prompt, seed, folder / f"{i}.mp4")
    made = [read_mp4(folder / f"{i}.mp4") for i in range(len(PROMPTS))]
    gap = np.full((*made[0].shape[:2], 4, 3), 255, np.uint8)
    wide = np.concatenate([part for clip in made for part in (gap, clip)][1:], axis=2)
    write_gif(ROOT / "weights" / "clips.gif", wide)


def side_by_side(folder: Path, seed: int, _: Path | None) -> None:
    """docs/images/compare.gif: one prompt with dense attention and with SLA, and their times.

    The file of the comparison goes to benchmarks/results/.
    """
    slagen("compare", PROMPTS[0], seed, folder / "made.mp4", "--methods", "dense,sla", "--no-controls", *LARGE)
    write_gif(ROOT / "docs" / "images" / "compare.gif", read_mp4(folder / "made.mp4"))
    shutil.copyfile(folder / "made.json", ROOT / "benchmarks" / "results" / "compare-tiny-wan-cpu.json")


def maps(folder: Path, seed: int, sla2: Path | None) -> None:
    """docs/images/METHOD.png: the softmax by pairs of blocks, beside what the method attends to exactly.

    sla2: weights with a router, as `slagen finetune --attention sla2` writes; None leaves its picture as it is.
    """
    for name, options in MAPS.items() if sla2 is None else [*MAPS.items(), ("sla2", ("--weights", str(sla2)))]:
        where = ("--steps", "8", "--layer", "2", "--step", "4", "--head", "0", "--attention", name)
        slagen("attention", PROMPTS[0], seed, folder / "map.png", "--overwrite", *where, *LARGE, *options)
        picture = Image.open(folder / "map.png").convert("RGB")
        picture = picture.crop((0, 0, picture.width, picture.height // 2)).quantize(32)
        picture.save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)


def slagen(command: str, prompt: str, seed: int, output: Path, *options: str) -> None:
    """Run a command on the bundled model."""
    words = [prompt, "--model", "tiny-wan", "--device", "cpu", "--seed", str(seed), "--output", str(output), *options]
    subprocess.run([sys.executable, "-m", "slagen", command, *words], check=True)


def write_gif(path: Path, frames: np.ndarray) -> None:
    """Write frames (N, H, W, 3) uint8 at 8 per second, the last one for half a second longer."""
    whole = [Image.fromarray(frame) for frame in frames]
    colours = whole[len(whole) // 2].quantize(24)  # one palette and no dithering keep the file small
    pictures = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in whole]
    pictures += [pictures[-1]] * 4
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=125, loop=0)
    path.write_bytes(buffer.getvalue())


def main() -> None:
    made = {"clips": clips, "compare": side_by_side, "maps": maps}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=list(made))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sla2", type=Path, help="weights of sla2 attention, for its block map")
    args = parser.parse_args()
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            made[what](Path(folder), args.seed, args.sla2)


if __name__ == "__main__":
    main()
