"""--preview: a small picture of the latents while they are denoised, by a linear map from their channels to colours."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slagen.events import Event
from slagen.generation.preflight import PREVIEW, PREVIEW_MARK, is_preview
from slagen.io.files import delete, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

FRAMES = 4  # latent frames of a picture at most, side by side
HEIGHT = 128  # pixels that a picture has at least
# Red, green and blue from -1 to 1 for each channel of normalised latents, and their values at zero as the last row.
# Source: latent_rgb_factors of Wan21 in ComfyUI's latent_formats.py.
WAN = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.142),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.074, 0.1636),
    (0.068, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.006, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.295),
    (0.1984, 0.0913, 0.1861),
    (-0.1835, -0.0868, -0.336),
)
# The same by least squares from seven videos of the bundled model, of whose variance the map explains 95 %.
TINY = (
    (-0.114, -0.08, -0.058),
    (-0.191, -0.139, -0.012),
    (0.126, 0.027, -0.137),
    (-0.037, -0.146, 0.07),
    (-0.015, 0.006, -0.045),
    (0.123, 0.102, 0.047),
    (-0.135, -0.107, -0.018),
    (-0.13, -0.181, -0.193),
    (0.187, 0.247, 0.242),
    (-0.125, -0.101, -0.076),
    (0.151, 0.103, -0.046),
    (0.02, 0.026, -0.005),
    (0.137, 0.135, 0.097),
    (-0.035, -0.103, -0.055),
    (0.017, 0.061, 0.049),
    (-0.023, -0.012, -0.023),
    (-0.187, -0.183, -0.065),
)


def colours_of(vae: Any) -> tuple[tuple[float, float, float], ...] | None:
    """The map of a VAE: 16 rows of channels and one of the values at zero; None where it is not known."""
    known = {(96, None, 16): WAN, (16, 2, 16): TINY}
    return known.get((vae.config.base_dim, vae.config.patch_size, vae.config.z_dim))


class Preview:
    """The picture beside one video, written anew every few steps and deleted in the end.

    Args:
        video: its path, on which the picture's depends. every: steps from one picture to the next.
        vae: whose latents they are. on_event: told where the picture is, or why there is none.
    """

    def __init__(self, video: Path, every: int, vae: Any, on_event: Callable[[Event], None]) -> None:
        self.path, self.every, self.colours = video.with_suffix(PREVIEW), every, colours_of(vae)
        self.on_event, self.seconds, self.is_told = on_event, 0.0, False
        if self.colours is None:
            on_event(Event("warning", "no preview is written, for the colours of this VAE's latents are not known"))

    def take(self, scheduler: Any, step: int, latents: Tensor) -> bool:
        """Write the picture after a step, counted from 0, if it is one's turn; returns whether it was.

        The seconds that this takes are added to `seconds`. A disk that does not take it is warned of, once.
        """
        if self.colours is None or (step + 1) % self.every:
            return False
        latents.flatten()[0].item()  # the device has ended the step
        began = time.perf_counter()
        try:
            write_bytes(self.path, picture(denoised(scheduler, latents), self.colours))
            kind, text = "note", f"the preview is in {self.path}"
        except OSError as error:
            kind, text = "warning", f"{self.path} could not be written ({error}); the video is generated all the same"
        if not self.is_told:
            self.on_event(Event(kind, text))
            self.is_told = True
        if kind == "note":
            self.on_event(Event("picture", str(self.path)))
        self.seconds += time.perf_counter() - began
        return True

    def close(self) -> None:
        """Delete the picture: the video is there, or the run has ended without."""
        if is_preview(self.path):
            delete(self.path)


def denoised(scheduler: Any, latents: Tensor) -> Tensor:
    """The clean latents that a step predicted, where the sampler keeps them (unipc, dpm++); else the noisy ones."""
    outputs = getattr(scheduler, "model_outputs", None) or [None]
    return latents if outputs[-1] is None else outputs[-1]


def picture(latents: Tensor, colours: tuple[tuple[float, float, float], ...]) -> bytes:
    """A PNG of latents (1, C, T, h, w): some of their frames side by side."""
    import torch
    from PIL import Image, PngImagePlugin

    count = latents.shape[2]
    first = min(1, count - 1)  # the very first is of one video frame alone, and may have other colours
    some = sorted({first + round(index * (count - 1 - first) / (FRAMES - 1)) for index in range(FRAMES)})
    frames = latents[0, :, some].float().cpu()
    *channels, zero = torch.tensor(colours)
    rgb = torch.einsum("cthw,cr->htwr", frames, torch.stack(channels)) + zero
    height, width = rgb.shape[0], rgb.shape[1] * rgb.shape[2]
    pixels = ((rgb.reshape(height, width, 3) + 1) * 127.5).clamp(0, 255).byte().numpy()
    scale = max(1, HEIGHT // height)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", PREVIEW_MARK)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((width * scale, height * scale)).save(data, "PNG", pnginfo=about)
    return data.getvalue()
