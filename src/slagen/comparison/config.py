"""CompareConfig: the settings of one call of `slagen compare`, checked where it is made. No torch here."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slagen.attention import registry
from slagen.attention.sla.config import check_fraction
from slagen.errors import UsageError
from slagen.generation.config import ATTENTION, OUTPUT, VIDEO, GenerateConfig
from slagen.io.forms import shown
from slagen.settings import option, settings_of

METHODS = ("dense", "sla", "sparse", "linear")
MAX_ROWS, MAX_REPEATS = 64, 100
DENSE, RANDOM, OTHER_SEED = "dense", "random", "other-seed"
# The options of an attention method, or around it, that each row takes where its method has them.
TAKEN = tuple(
    setting.field
    for setting in settings_of(GenerateConfig)
    if setting.about.panel == ATTENTION
    and setting.field not in ("attention", "sparsity", "sla_topk", "weights", "allow_untrained")
)
POLICY = ("dense_steps", "dense_layers", "min_tokens", "delta")  # of every method but dense
SCHEDULE = "sparsity_schedule"
NEEDED = {SCHEDULE: "sparsity"}  # the option that a method with this one has


def read_methods(text: str) -> tuple[str, ...]:
    """The methods of a list such as "dense,sla". Raises UsageError for one that does not exist."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name in registry.ADDITIONS:
            registry.get(name)  # says how it is given
        if name not in registry.METHODS:
            raise UsageError(f"methods contains {shown(name)}, which is not one of {', '.join(registry.METHODS)}.")
    return names


def read_fractions(text: str, name: str = "sparsity") -> tuple[float, ...]:
    """The numbers of a list such as "0.9,0.95". Raises UsageError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{name} is {shown(text)}, but must be one or more numbers separated by commas. Try --{name} 0.9,0.95."
        ) from None


@dataclass(frozen=True)
class CompareConfig:
    """One call of `slagen compare`.

    Args:
        base: the video and its sampling, with dense attention; the prompt of each clip takes the place of its own.
        methods: one row each, in order; a method that is named twice is run twice.
        sparsities: a row for each of these where a method has a sparsity; empty is the method's own.
        attention: options by field of GenerateConfig, for the methods that have them.
        no_controls: do not run random blocks and another seed as well.
        repeats: timed runs of each row; None is 3 for one prompt and 1 for a file of prompts.
        prompts: a file of prompts instead of the one of `base`.
        max_error: bound on the velocity error of every row that is not dense.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    base: GenerateConfig
    methods: tuple[str, ...] = option(
        METHODS, "Methods to compare, separated by commas. Default: dense,sla,sparse,linear.", panel=ATTENTION,
        kind=str, read=read_methods, metavar="LIST",
    )  # fmt: skip
    sparsities: tuple[float, ...] = option(
        (), "Sparsities to compare, separated by commas. Default: the value from training, or the method's default.",
        panel=ATTENTION,
        name="sparsity", kind=str, read=read_fractions, metavar="LIST",
    )  # fmt: skip
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    no_controls: bool = option(
        False,
        "Do not run the controls: attention to random key blocks, and dense attention with another seed.",
        panel=ATTENTION,
    )
    repeats: int | None = option(None, "Timed runs of each method. Default: 3, or 1 with --prompts.", panel=OUTPUT)
    prompts: str | None = option(
        None, "A file of prompts to average over, in the same format as for slagen batch.", panel=VIDEO, metavar="FILE"
    )
    max_error: float | None = option(
        None, "Fail with exit code 6 if the velocity error of a method is above this.", panel=OUTPUT
    )

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("methods is empty. Try --methods dense,sla.")
        for name in self.methods:
            registry.get(name)
        for sparsity in self.sparsities:
            check_fraction("sparsity", sparsity, "Try --sparsity 0.95.")
        if self.repeats is not None and not 1 <= self.repeats <= MAX_REPEATS:
            raise UsageError(f"repeats is {self.repeats}, but must be from 1 to {MAX_REPEATS}. Try --repeats 3.")
        if self.max_error is not None and not (math.isfinite(self.max_error) and self.max_error >= 0):
            raise UsageError(f"max_error is {self.max_error}, but must be a number of at least 0. Try --max-error 0.3.")
        self._check_taken()
        if len(self.rows) > MAX_ROWS:
            raise UsageError(
                f"{len(self.rows)} rows cannot be compared at once; the most is {MAX_ROWS}. Give fewer --methods or "
                "sparsities."
            )

    def _check_taken(self) -> None:
        """Raise UsageError for an option that no method of these has."""
        sparse = [registry.get(name) for name in self.methods if registry.get(name).family != "dense"]
        if self.sparsities and not any("sparsity" in method.option_names for method in sparse):
            raise UsageError(f"none of the methods {', '.join(self.methods)} has a sparsity. Leave --sparsity out.")
        for name, value in self._given.items():
            if name in POLICY:
                if not sparse:
                    raise UsageError(f"{name} does not apply to dense attention, the only method here. Leave it out.")
            elif name == "backend":
                registry_backends = {backend.name for method in sparse for backend in method.backends}
                if value not in registry_backends:
                    raise UsageError(
                        f"backend is {shown(value)}, which none of the methods {', '.join(self.methods)} has. "
                        "Leave --backend out."
                    )
            elif not any(NEEDED.get(name, name) in method.option_names for method in sparse):
                raise UsageError(
                    f"{name} is an option of {registry.takers(NEEDED.get(name, name))}, but of none of the methods "
                    "here. Leave it out."
                )

    @property
    def _given(self) -> dict[str, Any]:
        """What is given for the attention, the methods' own options by name."""
        given = {name: value for name, value in self.attention.items() if name != "attention_options"}
        plain = {
            setting.field: value
            for setting in settings_of(GenerateConfig)
            if setting.field in given and (value := given[setting.field]) != setting.default
        }
        return {**plain, **dict(self.attention.get("attention_options") or ())}

    @property
    def rows(self) -> list[GenerateConfig]:
        """What each row runs, in the order of the methods, and of the sparsities within one."""
        return [row for name in self.methods for row in self._rows_of(name)]

    @property
    def control_rows(self) -> dict[str, GenerateConfig]:
        """The controls by name: as many key blocks at random as the sparsest row keeps, and dense attention of the
        next seed."""
        if self.no_controls:
            return {}
        row = self._row(registry.get("sparse"), max(self.sparsities, default=None))
        options = {**dict(row.attention_options), "selector": "random"}
        return {
            RANDOM: dataclasses.replace(row, attention_options=tuple(options.items())),
            OTHER_SEED: self.dense,
        }

    @property
    def dense(self) -> GenerateConfig:
        """Dense attention, to which everything is compared."""
        return self.base.with_dense_attention()

    def _rows_of(self, name: str) -> list[GenerateConfig]:
        method = registry.get(name)
        if method.family == "dense":
            return [self.dense]
        # The linear branch over all tokens keeps no blocks, so that its sparsity changes nothing.
        if "sparsity" not in method.option_names or name == "linear" or not self.sparsities:
            return [self._row(method, None)]
        return [self._row(method, sparsity) for sparsity in self.sparsities]

    def _row(self, method: Any, sparsity: float | None) -> GenerateConfig:
        given = self._given
        own = {name: value for name, value in given.items() if name in method.option_names}
        fields = {name: own.pop(name) for name in ("block_m", "block_n") if name in own}
        policy = {name: given[name] for name in POLICY if name in given}
        if SCHEDULE in given and "sparsity" in method.option_names and method.name != "linear":
            policy[SCHEDULE] = given[SCHEDULE]
        backend = given.get("backend", "auto")
        known = [each.name for each in method.backends]
        return dataclasses.replace(
            self.base, attention=method.name, sparsity=sparsity, backend=backend if backend in known else "auto",
            attention_options=tuple(own.items()), allow_untrained=True, **fields, **policy,
        )  # fmt: skip
