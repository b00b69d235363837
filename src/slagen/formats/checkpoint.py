"""A transformer as it was read from a file, under diffusers' names."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from slagen.formats.quantised import Codes


@dataclass
class Checkpoint:
    """The transformer in a file, under diffusers' names.

    Args:
        path: the file or folder it was read from.
        layout: the form's name in LAYOUTS.
        tensors: of the transformer; what was int8 or fp8 is multiplied out, unless kept.
        projections: what an attention method learned (of SLA `proj_l`), by the processors' names; empty where there is
            none of it in the file.
        forms: what each tensor of 8 bits was in the file, such as "int8"; here it is of the kind that was asked for.
        kept: of these, the weights that stay as they are in the file; `tensors` has their shapes and no values.
        faults: what is wrong in the file itself, reported together with what does not fit a model.
    """

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    projections: dict[str, Tensor]
    forms: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Codes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def quantised(self) -> bool:
        return bool(self.forms)

    @property
    def num_layers(self) -> int:
        return 1 + max((int(m[1]) for name in self.tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)

    @property
    def width(self) -> int:
        """Heads x head dimension, 0 where even that cannot be read."""
        tensor = self.tensors.get("patch_embedding.bias", self.tensors.get("patch_embedding.weight"))
        return 0 if tensor is None else tensor.shape[0]
