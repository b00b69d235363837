"""How near a clip is to another, frame by frame: PSNR, SSIM, and LPIPS where its network is on this machine."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"  # of torchvision's AlexNet, as torch.hub keeps it


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of a whole clip in dB, from its mean squared error; None (infinite) for equal clips.

    Args:
        frames, reference: (F, H, W, 3) uint8.
    """
    squares = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(frames, reference, strict=True)]
    error = float(np.mean(squares))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def ssim(frames: np.ndarray, reference: np.ndarray) -> float | None:
    """Structural similarity, the mean of the frames; None where they are smaller than its window of 11 pixels.

    Args:
        frames, reference: (F, H, W, 3) uint8.
    """
    if min(frames.shape[1:3]) < 11:
        return None
    if np.array_equal(frames, reference):
        return 1.0
    values = [
        structural_similarity_index_measure(_image(a), _image(b), data_range=1.0)
        for a, b in zip(frames, reference, strict=True)
    ]
    return float(torch.stack([value for value in values if isinstance(value, torch.Tensor)]).mean())


def lpips(frames: np.ndarray, reference: np.ndarray) -> float | None:
    """LPIPS with AlexNet, the mean of the frames; None without `slagen[lpips]`, or where the network's weights are not
    in the cache of torch.hub, for nothing is downloaded here.

    Args:
        frames, reference: (F, H, W, 3) uint8.
    """
    measure = _lpips_network()
    if measure is None:
        return None
    with torch.inference_mode():
        values = [measure(_image(a), _image(b)) for a, b in zip(frames, reference, strict=True)]
    return float(torch.stack(values).mean())


def _image(frame: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255


@functools.cache
def _lpips_network() -> Any:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if importlib.util.find_spec("torchvision") is None or not weights.is_file():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
