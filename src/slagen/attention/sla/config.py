"""SLAConfig: how sparse-linear attention divides its work. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slagen.attention.cubes import Order, order_option
from slagen.attention.selectors import Selector, selector_option
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.settings import settings_of, to_fields

Backend = Literal["auto", "reference", "torch", "triton"]
LinearDomain = Literal["all", "marginal"]
FeatureMap = Literal["softmax", "elu", "relu"]

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class SLAConfig:
    """How sparse-linear attention divides its work between the exact and the linear branch.

    With N key blocks, every query block attends exactly to its `num_critical(N)` key blocks of highest score, drops its
    `num_negligible(N)` of lowest score, and leaves the rest, the marginal ones, to the linear branch.

    Args:
        sparsity: fraction of key blocks that is not attended exactly, in [0, 1). At least one block always is.
        negligible: fraction of key blocks that neither branch sees, in [0, 1). Needs `linear_domain="marginal"`.
        linear_domain: what the linear branch sums over. "all": every token, as the released weights were made;
            "marginal": the marginal blocks only, as in the paper. Weights of one do not suit the other.
        feature_map: phi of the linear branch: "softmax" over the head dimension, "elu" for elu(x) + 1, or "relu".
        block_m, block_n: query rows and key columns in a block: 16, 32, 64 or 128.
        order: in which order tokens are divided into blocks; "cube" needs their grid.
        selector: how key blocks are ranked, see `ranking.py`.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    sparsity: float = 0.95
    negligible: float = 0.0
    linear_domain: LinearDomain = "all"
    feature_map: FeatureMap = "softmax"
    block_m: int = 64
    block_n: int = 64
    order: Order = order_option()
    selector: Selector = selector_option()

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity, "Try --sparsity 0.95.")
        check_fraction("negligible", self.negligible, "Try --negligible 0.1, as in the SLA paper.")
        check_choice("linear_domain", self.linear_domain, get_args(LinearDomain))
        check_choice("feature_map", self.feature_map, get_args(FeatureMap))
        check_choice("block_m", self.block_m, BLOCK_SIZES)
        check_choice("block_n", self.block_n, BLOCK_SIZES)
        check_choice("order", self.order, get_args(Order))
        check_choice("selector", self.selector, get_args(Selector))
        if self.negligible > 0 and self.linear_domain == "all":
            raise UsageError(
                f"negligible is {self.negligible}, but with linear_domain 'all' the linear branch skips no tokens. "
                "Try --linear-domain marginal, or --negligible 0."
            )

    def num_blocks(self, length: int) -> tuple[int, int]:
        """The numbers of query and key blocks (M, N) that cover `length` tokens; the last ones may be partial."""
        return math.ceil(length / self.block_m), math.ceil(length / self.block_n)

    def num_critical(self, num_key_blocks: int) -> int:
        """How many of the key blocks a query block attends to exactly: at least 1."""
        return max(1, math.floor((1 - self.sparsity) * num_key_blocks + 1e-6))

    def with_topk(self, topk: float, num_key_blocks: int) -> SLAConfig:
        """The same with int(topk * N) of N key blocks critical, at least 1: as the published code counts a top-k.

        `topk * N` is that of floating point there, so 0.29 of 100 blocks are 28, where sparsity 0.71 leaves 29. Its
        sparsity is 1 - topk, or where that counts otherwise the fraction that is left out.
        """
        config, count = dataclasses.replace(self, sparsity=1 - topk), max(1, int(topk * num_key_blocks))
        if config.num_critical(num_key_blocks) == count:
            return config
        return dataclasses.replace(self, sparsity=1 - count / num_key_blocks)

    def with_options(self, options: Mapping[str, Any], length: int) -> SLAConfig:
        """The same with the fields and the top-k (`sla_topk`) that are asked for, for a clip of `length` tokens."""
        given = {name: value for name, value in options.items() if value is not None}
        topk = given.pop("sla_topk", None)
        config = dataclasses.replace(self, **given)
        return config if topk is None else config.with_topk(topk, config.num_blocks(length)[1])

    def differences(self, trained: SLAConfig) -> list[str]:
        """What to say of weights that were trained with a different sparsity, block size or token order."""
        found = []
        if not math.isclose(self.sparsity, trained.sparsity, abs_tol=1e-9):
            found.append(
                f"the weights were trained at sparsity {trained.sparsity:g}, but this run uses {self.sparsity:g}"
            )
        if (self.block_m, self.block_n) != (trained.block_m, trained.block_n):
            found.append(
                f"the weights were trained with blocks of {trained.block_m}x{trained.block_n} tokens, "
                f"but this run uses {self.block_m}x{self.block_n}"
            )
        if self.order != trained.order:
            found.append(
                f"the weights were trained with tokens in {trained.order} order, but this run uses {self.order}"
            )
        if self.selector != trained.selector:
            found.append(
                f"the weights were trained with the selector {trained.selector}, but this run uses {self.selector}"
            )
        return found

    def num_negligible(self, num_key_blocks: int) -> int:
        """How many of the key blocks no branch sees; the critical ones are chosen first."""
        wanted = math.floor(self.negligible * num_key_blocks + 1e-6)
        return min(num_key_blocks - self.num_critical(num_key_blocks), wanted)

    def num_marginal(self, num_key_blocks: int) -> int:
        """How many of the key blocks are neither critical nor negligible."""
        return num_key_blocks - self.num_critical(num_key_blocks) - self.num_negligible(num_key_blocks)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; `order` and `selector` only where they are not the default, as files have
        always been."""
        return to_fields(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SLAConfig:
        """Rebuild what `to_dict` gave. Raises UsageError unless every field that it always gives is there, and none is
        unknown."""
        if not isinstance(fields, dict):
            raise UsageError(f"SLA settings are {shown(fields)}, but must be a JSON object.")
        expected = {setting.field for setting in settings_of(cls) if not setting.about.later}
        known = {setting.field for setting in settings_of(cls)}
        faults = [f"lack {name}" for name in sorted(expected - fields.keys())]
        faults += [f"contain the unknown setting {name}" for name in sorted(fields.keys() - known)]
        if faults:
            raise UsageError(f"SLA settings {' and '.join(faults)}. Give exactly {', '.join(sorted(expected))}.")
        return cls(**fields)


def check_fraction(name: str, value: object, advice: str) -> None:
    """Raise UsageError unless a value is a number in [0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:  # nan fails here too
        raise UsageError(f"{name} is {shown(value)}, but must be a number of at least 0 and below 1. {advice}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise UsageError unless a value of SLAConfig is one of the choices, and of its type."""
    # True == 1 and 64.0 == 64, so the type is compared too
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        default = SLAConfig.__dataclass_fields__[name].default
        choice = ", ".join(map(repr, choices))
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{name} is {shown(value)}, but must be one of {choice}. Try {option} {default}.")
