"""The LoRA files of a run: read and checked against the model before any weight is loaded, and described."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slagen.attention.cost import ModelShape
from slagen.formats.headers import check_weights
from slagen.formats.lora import LoraFile, check_lora, read_lora
from slagen.generation.config import GenerateConfig
from slagen.generation.lora import AskedLora, asked_loras, read_lora_option
from slagen.io.paths import user_path
from slagen.io.text import counted, cut

WRITTEN = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NAMED = 3  # tensors without effect that a warning names


def lora_file(path: Path) -> Path:
    """A LoRA file that is given; of a folder that diffusers or peft wrote, the one in it."""
    return next((file for name in WRITTEN if (file := path / name).is_file()), path)


def find_loras(
    lora: Sequence[str], shape: ModelShape, model: str, *, takes_image: bool = False
) -> tuple[LoraFile, ...]:
    """The files of --lora, checked by their headers.

    Args:
        lora: as GenerateConfig has it. shape: of the model's transformer. model: its name, for messages.
        takes_image: whether it is an image-to-video model.
    Raises: MissingPath where one does not exist, WeightsError where it is no LoRA for the model.
    """
    found = []
    for text in lora:
        path = lora_file(user_path(read_lora_option(text).path))
        check_weights(path)
        found.append(check_lora(read_lora(path), shape, model, takes_image=takes_image))
    return tuple(found)


def describe_loras(files: Sequence[LoraFile], asked: Sequence[AskedLora]) -> tuple[list[str], list[str]]:
    """Notes on what each LoRA changes, and warnings on tensors that change nothing."""
    notes, warnings = [], []
    for file, lora in zip(files, asked, strict=True):
        if not lora.scale:
            notes.append(f"LoRA {file.path.name} has the scale 0, so it is not used")
            continue
        total = file.matched + len(file.unmatched)
        changed = f"{counted(file.matched, 'tensor')} for {counted(len(file.layers), 'layer')}"
        notes.append(f"LoRA {file.path.name} at scale {lora.scale:g}: {changed} of this model")
        if file.unmatched:
            names = ", ".join(cut(name, 80) for name in file.unmatched[:NAMED])
            more = f" and {len(file.unmatched) - NAMED} more" if len(file.unmatched) > NAMED else ""
            warnings.append(
                f"{len(file.unmatched)} of {counted(total, 'tensor')} in {file.path.name} match no layer of this model "
                f"and are not used: {names}{more}"
            )
    return notes, warnings


def lora_notes(config: GenerateConfig, shape: ModelShape, model: str, takes_image: bool) -> list[str]:
    """What the LoRAs of a config change, and do not, for a plan. Raises as `find_loras` and `asked_loras`."""
    files = find_loras(config.lora, shape, model, takes_image=takes_image)
    notes, warnings = describe_loras(files, asked_loras(config.lora, config.lora_scale))
    return notes + warnings
