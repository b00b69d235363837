"""LoRAs as they are asked for: FILE or FILE:SCALE, several of them, and other scales for one video. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.text import counted, quote_path

MAX_SCALE = 100.0
MAX_LORAS = 16
EXAMPLE = "Try --lora FILE:0.8."


@dataclass(frozen=True)
class AskedLora:
    """A LoRA as it is asked for: its file as typed, and its scale, by which what it adds is multiplied."""

    path: str
    scale: float

    def __str__(self) -> str:
        return f"{self.path}:{str(self.scale).removesuffix('.0')}"


def read_lora_option(text: str) -> AskedLora:
    """The file and the scale of "FILE:SCALE"; of a file alone the scale is 1. Raises UsageError."""
    path, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon and path else None
    except ValueError:
        scale = None  # a colon within the path
    if scale is None:
        return AskedLora(_path(text), 1.0)
    return AskedLora(_path(path), _checked(scale, text))


def _path(text: str) -> str:
    if not text.strip():
        raise UsageError(f"lora is {shown(text)}, but must name a file. {EXAMPLE}")
    return text


def _checked(scale: float, text: str) -> float:
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise UsageError(
            f"the scale in {quote_path(text)} must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}. {EXAMPLE}"
        )
    return scale


def lora_options(given: Any) -> tuple[str, ...]:
    """What is given as `lora`, one or several, as strings. Raises UsageError for a fault in any, and for too many."""
    each = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    texts = tuple(str(one) if isinstance(one, Path) else one for one in each)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"lora is {shown(text)}, but must be a string, FILE or FILE:SCALE. {EXAMPLE}")
        read_lora_option(text)
    if len(texts) > MAX_LORAS:
        raise UsageError(f"{len(texts)} LoRAs are given, but at most {MAX_LORAS} can be used at once.")
    return texts


def read_scales(text: str) -> tuple[float, ...]:
    """The scales of "0.8" or "0.8,1". Raises UsageError."""
    try:
        return tuple(_checked(float(part), part) for part in str(text).split(","))
    except ValueError:
        raise UsageError(
            f"lora_scale is {shown(text)}, but must be a number, or one for each LoRA, separated by commas. "
            "Try --lora-scale 0.8."
        ) from None


def asked_loras(lora: tuple[str, ...], lora_scale: str | None) -> tuple[AskedLora, ...]:
    """The LoRAs of a video with their scales.

    Args:
        lora: as `lora_options` returns them. lora_scale: scales in place of theirs; one alone is that of all.
    Raises: UsageError for scales without LoRAs, or of another number.
    """
    asked = tuple(map(read_lora_option, lora))
    if lora_scale is None:
        return asked
    scales = read_scales(lora_scale)
    if not asked:
        raise UsageError("lora_scale is given, but no LoRA. Give one with --lora, or leave lora_scale out.")
    if len(scales) not in (1, len(asked)):
        raise UsageError(
            f"lora_scale has {counted(len(scales), 'number')}, but there are {counted(len(asked), 'LoRA')}. Give one "
            "number for all, or one for each."
        )
    scales = scales * len(asked) if len(scales) == 1 else scales
    return tuple(AskedLora(each.path, scale) for each, scale in zip(asked, scales, strict=True))
