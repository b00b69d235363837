"""The image that an image-to-video model starts from: looked at before anything is loaded, cropped to the clip."""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slagen.errors import UsageError
from slagen.io.paths import user_path
from slagen.io.reading import file_hash, kind_of_path

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST = 16  # pixels of each side
FORMATS = "Give a PNG, JPEG or WebP file."


@dataclass(frozen=True)
class Picture:
    """An image file.

    Args:
        width, height: in pixels, turned as its EXIF data says.
    """

    path: Path
    sha256: str
    width: int
    height: int

    def cropped(self, width: int, height: int) -> Image:
        """The image as RGB, scaled until it covers width x height pixels, and cropped there around its middle.

        Raises: UsageError where the file is broken.
        """
        from PIL import Image, ImageOps

        image = _opened(self.path)
        return ImageOps.fit(_rgb(image), (width, height), Image.Resampling.LANCZOS)

    def size_of(self, area: int, grid: int) -> tuple[int, int]:
        """Width and height of about an area in this image's aspect ratio, in multiples of `grid` pixels: as Wan2.1's
        own code chooses them (wan/image2video.py, `generate`)."""
        ratio = self.height / self.width
        sides = math.sqrt(area / ratio), math.sqrt(area * ratio)
        width, height = (max(grid, int(round(side)) // grid * grid) for side in sides)
        return width, height

    def enlarged(self, width: int, height: int) -> str | None:
        """A warning where the image is far smaller than the clip; None where it is not."""
        if max(width / self.width, height / self.height) <= 2:
            return None
        return (
            f"the image is only {self.width}x{self.height}, so it is enlarged to {width}x{height}, and the video will "
            "be blurred"
        )


def look_at(text: str) -> Picture:
    """An image file by the path that was typed. Raises UsageError unless it is a whole image."""
    path = user_path(text)
    image = _opened(path)
    if min(image.size) < LEAST:
        raise UsageError(
            f"the image {path} is {image.width}x{image.height} pixels, but both sides must be at least {LEAST}."
        )
    return Picture(path, file_hash(path), *image.size)


def _opened(path: Path) -> Image:
    """An image with all its pixels, turned upright; of several frames the first. Raises UsageError."""
    from PIL import Image, ImageOps

    if not path.is_file():
        raise UsageError(f"the image {path} {kind_of_path(path)}. {FORMATS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Any = Image.open(path)
            image.load()
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UsageError(
            f"the image {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels. Make it smaller."
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, struct.error) as error:
        raise UsageError(f"{path} is not an image that can be read, or is broken. {FORMATS}") from error


def _rgb(image: Image) -> Image:
    """In 8 bits of red, green and blue; what is transparent becomes white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
