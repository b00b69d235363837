"""Videos beside each other in one, each under its label."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IN_A_ROW = 6  # clips
GAP = 4  # pixels between clips


def side_by_side(clips: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Videos (F, H, W, 3) uint8 of one size beside each other, each under its label, which may have several lines."""
    frames, height, width, _ = clips[0].shape
    line, gap = line_height(height), GAP
    band = line * max(label.count("\n") + 1 for label in labels)
    columns = min(IN_A_ROW, len(clips))
    rows = -(-len(clips) // columns)
    size = (rows * (height + band + gap) - gap, columns * (width + gap) - gap)
    canvas = np.zeros((frames, *(side + side % 2 for side in size), 3), np.uint8)
    font = ImageFont.load_default(line * 0.7)
    for i, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        top, left = i // columns * (height + band + gap), i % columns * (width + gap)
        title = Image.new("RGB", (width, band))
        for number, text in enumerate(label.split("\n")):
            ImageDraw.Draw(title).text((2, line * (number + 0.5)), text, fill="white", font=font, anchor="lm")
        canvas[:, top : top + band, left : left + width] = np.asarray(title)
        canvas[:, top + band : top + band + height, left : left + width] = clip
    return canvas


def line_height(height: int) -> int:
    """Pixels of a line of a label above clips of a height."""
    return max(16, height // 16)


def part_of(video: np.ndarray, index: int, height: int, width: int) -> np.ndarray:
    """A clip cut out of `side_by_side` of one row whose labels have one line: (F, height, width, 3) uint8."""
    top, left = line_height(height), index * (width + GAP)
    return video[:, top : top + height, left : left + width]
