"""Read colour, shape, motion and background of a clip from its pixels.

`python scripts/tiny_wan/checker.py` validates this on rendered clips of every size; `check(frames)` checks any clip.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Size, _distance_tables, render, sample_scene
from scipy import ndimage

MASK_DISTANCE = 60.0  # RGB distance from the background that counts as object, before its colour is known
MIN_OVERLAP = 0.80  # mean intersection over union with the best template, below which no shape is recognised
MIN_WHOLE = 0.95  # share of the object's pixels in its largest piece, on average
MIN_RADIUS = 24  # pixels, below which a disc's own steps count too much to say how round it is
GRID = 48


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; "none" where nothing is recognised.

    Args:
        overlap: mean IoU of the object with its shape's template, each in its own bounding box.
        whole: mean share of the object's pixels in its largest piece.
        roundness: mean IoU of the object with the disc of its centre and area, over the middle half of the frames,
            where that disc's radius is MIN_RADIUS or more; None where it never is.
    """

    colour: str
    shape: str
    motion: str
    background: str
    overlap: float
    whole: float
    roundness: float | None = None

    def right(self, scene: Scene) -> dict[str, bool]:
        """Which attributes are as a scene says, and `all` of them."""
        names = ("colour", "shape", "motion", "background")
        right = {name: getattr(self, name) == getattr(scene, name) for name in names}
        return {**right, "all": all(right.values())}


def check(frames: np.ndarray) -> Verdict:
    """Judge a clip: frames (F, H, W, 3) uint8."""
    pixels = frames.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    shade = np.median(border.reshape(-1, 3), axis=0)
    masks = np.linalg.norm(pixels - shade, axis=-1) > MASK_DISTANCE
    background = _nearest(shade, BACKGROUNDS)
    areas = masks.sum((1, 2))
    if (areas < 12).sum() > len(frames) // 4:
        return Verdict("none", "none", "none", background, 0.0, 0.0)
    core = np.stack([ndimage.binary_erosion(m, iterations=2) if m.sum() > 80 else m for m in masks])
    if not core.any():
        return Verdict("none", "none", "none", background, 0.0, 0.0)
    hue = np.median(pixels[core], axis=0)
    colour = _nearest(hue, COLOURS)
    # An edge lies half way between the two colours, however soft it is.
    masks = (pixels - shade) @ (hue - shade) > 0.5 * np.square(hue - shade).sum()
    if not masks.any():
        return Verdict(colour, "none", "none", background, 0.0, 0.0)
    pieces = [_largest_piece(mask) for mask in masks]
    whole = float(np.mean([piece.sum() / max(1, mask.sum()) for piece, mask in zip(pieces, masks, strict=True)]))
    shape, overlap = _shape(pieces)
    shape = shape if whole >= MIN_WHOLE else "none"
    return Verdict(colour, shape, _motion(pieces), background, overlap, whole, _roundness(pieces))


def _nearest(value: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(value - np.array(rgb))) for name, rgb in table.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < 60 else "none"


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    return labels == 1 + int(np.argmax(ndimage.sum(mask, labels, range(1, count + 1))))


@cache
def _templates() -> np.ndarray:
    """(4, GRID, GRID) bool: each shape in its own bounding box."""
    inside = (_distance_tables()[:, 0] < 0).numpy()
    return np.stack([_boxed(mask) for mask in inside])


def _boxed(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box, stretched to GRID x GRID."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.interpolate(torch.from_numpy(box)[None, None].float(), (GRID, GRID), mode="bilinear")[0, 0].numpy() > 0.5


def _shape(masks: list[np.ndarray]) -> tuple[str, float]:
    """The template with the highest mean IoU over the frames where the object is large enough to have a shape."""
    largest = max(mask.sum() for mask in masks)
    boxes = np.stack([_boxed(mask) for mask in masks if mask.sum() >= max(60, 0.35 * largest)] or [_boxed(masks[0])])
    templates = _templates()
    both = (boxes[:, None] & templates[None]).sum((2, 3))
    either = (boxes[:, None] | templates[None]).sum((2, 3))
    overlap = (both / either).mean(0)
    best = int(overlap.argmax())
    return (SHAPES[best] if overlap[best] >= MIN_OVERLAP else "none"), float(overlap[best])


def _roundness(masks: list[np.ndarray]) -> float | None:
    """As in Verdict."""
    rows, columns = np.indices(masks[0].shape)
    quarter, found = len(masks) // 4, []
    for mask in masks[quarter : len(masks) - quarter]:
        squared = mask.sum() / np.pi
        if squared >= MIN_RADIUS**2:
            y, x = ndimage.center_of_mass(mask)
            disc = (rows - y) ** 2 + (columns - x) ** 2 <= squared
            found.append((mask & disc).sum() / (mask | disc).sum())
    return float(np.mean(found)) if found else None


def _motion(masks: list[np.ndarray]) -> str:
    """The motion between the first and the last quarter of the clip."""
    seen = [mask for mask in masks if mask.any()]
    centres = np.array([ndimage.center_of_mass(mask) for mask in seen]) / seen[0].shape[0]
    areas = np.array([mask.sum() for mask in seen], dtype=float)
    ends = max(1, len(seen) // 6)
    ratio = areas[-ends:].mean() / max(1.0, areas[:ends].mean())
    if ratio > 2.5 or ratio < 1 / 2.5:
        return "growing" if ratio > 1 else "shrinking"
    down, right = centres[-ends:].mean(0) - centres[:ends].mean(0)
    if max(abs(down), abs(right)) < 0.2 or min(abs(down), abs(right)) > 0.5 * max(abs(down), abs(right)):
        return "none"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def validate(size: Size, count: int) -> None:
    """Say how many of `count` rendered clips are read right, what the others are taken for, how round circles are."""
    rng = random.Random(99)
    wrong, round_ones = 0, []
    for i in range(count):
        scene = sample_scene(rng, shape=SHAPES[i % 4])
        clip = render([scene], size.frames, size.side)[0]
        verdict = check(((clip + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
        if not verdict.right(scene)["all"]:
            wrong += 1
            print(scene, verdict)
        if scene.shape == "circle" and verdict.roundness is not None:
            round_ones.append(verdict.roundness)
    print(f"{size}: {count - wrong} of {count} rendered clips are read correctly; "
          f"mean roundness of {len(round_ones)} circles: {np.mean(round_ones):.3f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256, help="number of clips per size (default: 256)")
    args = parser.parse_args()
    for size in SIZES:
        validate(size, args.clips)


if __name__ == "__main__":
    main()
