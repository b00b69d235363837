"""Videos of the dense model and the student side by side, for the same prompts and seeds."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def side_by_side(clips: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Videos (F, H, W, 3) uint8 of one size beside each other, each under its label."""
    frames, height, width, _ = clips[0].shape
    band, gap = max(16, height // 16), 4
    total = len(clips) * (width + gap) - gap
    canvas = np.zeros((frames, height + band + (height + band) % 2, total + total % 2, 3), np.uint8)
    title = Image.new("RGB", (canvas.shape[2], band))
    draw = ImageDraw.Draw(title)
    font = ImageFont.load_default(band * 0.7)
    for i, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        left = i * (width + gap)
        canvas[:, band : band + height, left : left + width] = clip
        draw.text((left + 2, band // 2), label, fill="white", font=font, anchor="lm")
    canvas[:, :band] = np.asarray(title)
    return canvas
