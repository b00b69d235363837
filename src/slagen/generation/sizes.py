"""The size of a clip, in every form that is understood: 832x480, 832*480, width and height, 480p with a ratio."""

import re

from slagen.errors import UsageError
from slagen.io.text import quote

# Width and height by resolution and aspect ratio: Wan's own sizes, and TurboDiffusion's for the ratios Wan has not.
RESOLUTIONS = {
    "480p": {"16:9": (832, 480), "9:16": (480, 832), "4:3": (640, 480), "3:4": (480, 640), "1:1": (640, 640)},
    "720p": {"16:9": (1280, 720), "9:16": (720, 1280), "4:3": (960, 720), "3:4": (720, 960), "1:1": (960, 960)},
}


def clip_size(
    size: str | None = None, width: int | None = None, height: int | None = None, resolution: str | None = None,
    aspect_ratio: str | None = None,
) -> tuple[int | None, int | None]:  # fmt: skip
    """Width and height in pixels of what is given; None twice where nothing is.

    Args:
        size: WxH, W*H or a resolution. resolution: 480p or 720p. aspect_ratio: with one of these, 16:9 unless given.
    Raises: UsageError for what is none of these, or said twice.
    """
    ways = {"--size": size, "--resolution": resolution, "--width and --height": width if height is None else height}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each set the size of the video. Give one of them.")
    name, text = ("resolution", resolution) if resolution is not None else ("size", size)
    tier = _tier(text)
    if tier is not None:
        return _of_ratio(tier, "16:9" if aspect_ratio is None else aspect_ratio)
    if aspect_ratio is not None:
        raise UsageError(f"--aspect-ratio {quote(aspect_ratio)} needs a resolution. Add --resolution 480p or 720p.")
    if text is None:
        return width, height
    if name == "resolution":
        raise UsageError(
            f"resolution is {quote(text)}, but must be 480p or 720p. For other sizes, use --size, "
            "such as --size 832x480."
        )
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX*×]\s*(\d{1,5})\s*", text)
    if match is None:
        raise UsageError(
            f"size is {quote(text)}, but must be width x height in pixels, or 480p or 720p. Try --size 832x480."
        )
    return int(match[1]), int(match[2])


def check_grid(width: int, height: int, spatial_grid: int = 16) -> None:
    """Raise UsageError for a size that a model does not make.

    Args:
        spatial_grid: width and height of the model's tokens, in pixels.
    """
    grid = max(16, spatial_grid)  # WanPipeline itself takes multiples of 16 only
    if width % grid or height % grid:
        nearest = "x".join(str(max(grid, round(x / grid) * grid)) for x in (width, height))
        raise UsageError(
            f"size is {width}x{height}, but both sides must be multiples of {grid} pixels. Try --size {nearest}."
        )


def _tier(text: str | None) -> str | None:
    """The resolution that a text names, with or without its p; None for any other text."""
    tier = "" if text is None else text.strip().lower().removesuffix("p") + "p"
    return tier if tier in RESOLUTIONS else None


def _of_ratio(tier: str, ratio: str) -> tuple[int, int]:
    plain = re.sub(r"[\s,x*/]+", ":", ratio.strip().lower())
    if plain not in RESOLUTIONS[tier]:
        raise UsageError(
            f"aspect ratio is {quote(ratio)}, but must be one of {', '.join(RESOLUTIONS[tier])}. For other sizes, use "
            "--size, such as --size 832x480."
        )
    return RESOLUTIONS[tier][plain]
