"""The record of the device that ran something and of its host, as reports and results have it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device and its host.

    Args:
        type: "cuda" or "cpu". name: of the card or the processor.
        memory_gib, capability, cuda: of a card, as "9.0", and the version of CUDA; None elsewhere.
        cpu: the host's processor, with so many cores, of which PyTorch takes so many threads.
    """

    type: str
    name: str
    memory_gib: float | None = None
    capability: str | None = None
    cuda: str | None = None
    cpu: str
    cores: int | None
    threads: int
    platform: str

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        of_cards = () if self.type == "cuda" else ("memory_gib", "capability", "cuda")
        return {name: value for name, value in vars(self).items() if name not in of_cards}
