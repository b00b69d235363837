"""The step caches that --cache names: their parameters, and those that Wan's pipeline cannot have. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slagen.errors import UsageError
from slagen.io.documents import read_json
from slagen.io.forms import Kind
from slagen.io.paths import user_path
from slagen.io.text import quote

RATIOS = "ratios"
MAX_RATIO, MAX_STEPS = 1e6, 1000
FORM = {"cache": {RATIOS: [Kind("a number from 0 to 1e6", float, lambda value: 0 <= value <= MAX_RATIO)]}}


@dataclass(frozen=True)
class Parameter:
    """A number that a cache takes: its default, which tells whether it is whole, and its range."""

    default: float | int | None
    least: float
    most: float = MAX_STEPS


# By name, as diffusers calls them.
CACHES = {
    "first-block": {"threshold": Parameter(0.05, 0.0, MAX_RATIO)},
    "mag": {
        "threshold": Parameter(0.06, 0.0, MAX_RATIO), "max_skip_steps": Parameter(3, 1),
        "retention_ratio": Parameter(0.2, 0.0, 1.0), "calibrate": Parameter(0, 0, 1),
    },
    "sea": {
        "threshold": Parameter(0.25, 0.0, MAX_RATIO), "residual_order": Parameter(1, 0, 1),
        "retention_steps": Parameter(1, 0), "cache_end_steps": Parameter(1, 0),
        "max_consecutive_cached": Parameter(2, 0), "power_exp": Parameter(3.0, 0.01, 100.0),
    },
    "taylorseer": {
        "cache_interval": Parameter(5, 1), "disable_cache_before_step": Parameter(3, 1),
        "disable_cache_after_step": Parameter(None, 0), "max_order": Parameter(1, 0, 8),
    },
}  # fmt: skip
_PASSES = "Wan's pipeline makes the two guidance passes one after the other"
REFUSED = {
    "faster": f"FasterCache needs both guidance passes in one batch, but {_PASSES}",
    "pyramid-attention-broadcast": "PyramidAttentionBroadcast reuses the attention of the pass before, but "
    f"{_PASSES}, so that each would get the other's",
    "tea": "TeaCache is not in diffusers; first-block decides in a similar way",
    "text-kv": "TextKVCache keeps keys and values of the text, which Wan's blocks do not hand over",
}
ALIASES = {
    "fbcache": "first-block", "firstblockcache": "first-block", "first-block-cache": "first-block", "fb": "first-block",
    "magcache": "mag", "mag-cache": "mag", "seacache": "sea", "sea-cache": "sea", "taylorseercache": "taylorseer",
    "taylorseer-cache": "taylorseer", "taylor": "taylorseer", "fastercache": "faster", "faster-cache": "faster",
    "pab": "pyramid-attention-broadcast", "pyramidattentionbroadcast": "pyramid-attention-broadcast",
    "teacache": "tea", "tea-cache": "tea", "textkvcache": "text-kv",
}  # fmt: skip


@dataclass(frozen=True)
class StepCache:
    """A cache with its parameters, those that are not given left out. ratios: of mag, one for each step that they were
    measured in."""

    name: str
    given: tuple[tuple[str, float | int], ...] = ()
    ratios: tuple[float, ...] = ()

    @property
    def parameters(self) -> dict[str, float | int | None]:
        """All of them."""
        return {name: each.default for name, each in CACHES[self.name].items()} | dict(self.given)

    @property
    def calibrates(self) -> bool:
        """Whether it only measures its ratios, and skips nothing."""
        return bool(self.parameters.get("calibrate"))

    @property
    def text(self) -> str:
        """As --cache takes it."""
        parts = [f"{name}={value:.12g}" for name, value in self.given]
        parts += [f"{RATIOS}={'/'.join(f'{ratio:.6g}' for ratio in self.ratios)}"] if self.ratios else []
        return f"{self.name}:{','.join(parts)}" if parts else self.name


def read_cache(text: str) -> StepCache:
    """The cache of NAME or NAME:PARAMETER=VALUE,... The ratios of mag are numbers with slashes between them, or a
    report that has them.

    Raises: UsageError for a name or parameter that there is not, a value out of range, and a report without ratios.
    """
    name, _, rest = text.strip().partition(":")
    name = name.strip().lower().replace("_", "-")
    name = ALIASES.get(name, name)
    if name in REFUSED:
        raise UsageError(f"cache is {quote(text)}, but {REFUSED[name]}. Try one of {', '.join(CACHES)}.")
    if name not in CACHES:
        raise UsageError(f"cache is {quote(text)}, but must be one of {', '.join(CACHES)}. Try --cache first-block.")
    known, given, ratios = CACHES[name], dict[str, float | int](), tuple[float, ...]()
    for part in rest.split(",") if rest.strip() else []:
        key, equals, value = part.partition("=")
        key = key.strip().lower().replace("-", "_")
        if key == RATIOS and name == "mag" and equals:
            ratios = _ratios(value.strip())
        elif key not in known or not equals:
            names = [*known, *([RATIOS] if name == "mag" else [])]
            raise UsageError(f"cache is {quote(text)}, but {name} takes {', '.join(names)}. {_example(name)}")
        elif key in given:
            raise UsageError(f"cache is {quote(text)}, but {key} is there twice. Give one of them.")
        else:
            given[key] = _number(name, key, value.strip())
    found = StepCache(name, tuple(sorted(given.items())), ratios)
    if name == "mag" and not ratios and not found.calibrates:
        raise UsageError(
            "mag needs its ratios, which depend on model and sampler. Measure them in a run with --cache "
            "mag:calibrate=1, and give the report of that: --cache mag:ratios=report.json."
        )
    return found


def _example(name: str) -> str:
    key, parameter = next(iter(CACHES[name].items()))
    return f"Try --cache {name}:{key}={parameter.default:g}."


def _number(cache: str, key: str, value: str) -> float | int:
    parameter = CACHES[cache][key]
    whole = not isinstance(parameter.default, float)
    try:
        number: float | int = int(value) if whole else float(value)
    except ValueError:
        number = float("nan")
    if not parameter.least <= number <= parameter.most:
        kind = "a whole number" if whole else "a number"
        raise UsageError(
            f"{key} of the cache {cache} is {quote(value)}, but must be {kind} from {parameter.least:g} to "
            f"{parameter.most:g}. {_example(cache)}"
        )
    return number


def _ratios(value: str) -> tuple[float, ...]:
    """Ratios as they are typed, or in a report."""
    if value.lower().endswith(".json"):
        advice = "Give the report of a run with --cache mag:calibrate=1."
        content: dict[str, Any] = read_json(user_path(value), FORM, UsageError, advice)
        return tuple(content["cache"][RATIOS])
    try:
        found = tuple(float(part) for part in value.split("/"))
    except ValueError:
        found = ()
    if not 0 < len(found) <= MAX_STEPS or not all(0 <= ratio <= MAX_RATIO for ratio in found):
        raise UsageError(
            f"ratios of the cache mag is {quote(value)}, but must be a report that ends in .json, or numbers with "
            "slashes between them. Try --cache mag:ratios=report.json."
        )
    return found
