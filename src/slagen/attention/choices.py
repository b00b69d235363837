"""The texts that choose denoising steps or layers, such as 0-9,-1 and 0-9:0.8,10-:0.95/0.9. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slagen.errors import UsageError
from slagen.io.forms import shown

EXAMPLE = "Try --sparsity-schedule 0-9:0.8,10-:0.95."
_RANGE = re.compile(r"(-?\d{1,4})(?:(-)(-?\d{1,4})?)?")
_PERCENTAGE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_NUMBER = re.compile(r"-?(?:\d{1,6}(?:\.\d{0,16})?|\.\d{1,16})")

Chosen = list[tuple[int, int]] | float  # ranges, their ends included and -1 the last, or a fraction of all
Sparsity = float | tuple[float, ...]  # of all layers, or of each


def parse(name: str, text: object) -> Chosen:
    """What a text chooses, of any number of steps or layers. Raises UsageError."""
    pieces = [piece.strip() for piece in text.split(",")] if isinstance(text, str) else []
    if len(pieces) == 1 and (fraction := _fraction(pieces[0])) is not None:
        return fraction
    ranges = [found for piece in pieces if (found := _range(piece)) is not None]
    if not pieces or len(ranges) < len(pieces):
        raise UsageError(
            f"{name} is {shown(text)}, but must be numbers and ranges, or a percentage. Try "
            f"--{name.replace('_', '-')} 0-9,-1 or --{name.replace('_', '-')} 20%."
        )
    return ranges


def _fraction(text: str) -> float | None:
    """0.2 of "20%"; None for what is no percentage of at most 100."""
    match = _PERCENTAGE.fullmatch(text)
    return float(match[1]) / 100 if match is not None and float(match[1]) <= 100 else None


def _range(text: str) -> tuple[int, int] | None:
    """The ends of "0-9", "3", "-3--1" or, to the last one, "10-"; None for what is none of these."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first = int(match[1])
    return first, first if match[2] is None else int(match[3] or -1)


def chosen(name: str, text: str | None, count: int) -> tuple[int, ...]:
    """The numbers, from 0, that a text chooses of so many. Raises UsageError."""
    return () if text is None else _numbers(name, text, parse(name, text), count, f"--{name.replace('_', '-')} 0")


def _numbers(name: str, text: str, parsed: Chosen, count: int, example: str) -> tuple[int, ...]:
    """Those of what a text was parsed to; `example`: what to try instead."""
    if isinstance(parsed, float):
        return tuple(range(min(count, round(parsed * count))))
    found = set[int]()
    for pair in parsed:
        first, last = (index + count if index < 0 else index for index in pair)
        if not 0 <= first <= last < count:
            what = "layers" if name == "dense_layers" else "steps"
            raise UsageError(
                f"{name} is {shown(text)}, but there are {count} {what}: 0 to {count - 1}, or -{count} to -1 from the "
                f"end. Try {example}."
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def parse_schedule(text: object) -> list[tuple[Chosen, Sparsity]]:
    """The pairs of a --sparsity-schedule: which steps, and their sparsity, or that of each layer. Raises UsageError."""
    pairs = list[tuple[Chosen, Sparsity]]()
    for piece in text.split(",") if isinstance(text, str) else [""]:
        steps, _, sparsities = (part.strip() for part in piece.partition(":"))
        ends = _range(steps)
        chosen: Chosen | None = _fraction(steps) if ends is None else [ends]
        numbers = [number.strip() for number in sparsities.split("/")]
        if chosen is None or not all(map(_NUMBER.fullmatch, numbers)):
            raise UsageError(
                f"sparsity_schedule is {shown(text)}, but must be pairs STEPS:SPARSITY, separated by commas. {EXAMPLE}"
            )
        for number in numbers:
            if not 0 <= float(number) < 1:
                raise UsageError(
                    f"sparsity_schedule is {shown(text)}, but a sparsity must be at least 0 and below 1, not {number}. "
                    f"{EXAMPLE}"
                )
        found = tuple(map(float, numbers))
        pairs.append((chosen, found if len(found) > 1 else found[0]))
    return pairs


def for_all_steps(sparsities: Sequence[float]) -> str:
    """The --sparsity-schedule that gives each layer its sparsity, in all steps."""
    return "0-:" + "/".join(f"{each:.12g}" for each in sparsities)


def in_all_steps(text: str) -> Sparsity | None:
    """The sparsity that a --sparsity-schedule gives to all steps, however many there are; None where it does not.

    Raises: UsageError as `parse_schedule`.
    """
    (steps, sparsity), *others = parse_schedule(text)
    return sparsity if not others and steps in ([(0, -1)], 1.0) else None


def scheduled(text: str | None, num_steps: int) -> tuple[Sparsity | None, ...]:
    """The sparsity of each denoising step by a --sparsity-schedule; None where no pair says it.

    Raises: UsageError for a step that there is not, or that two pairs name.
    """
    found: list[Sparsity | None] = [None] * num_steps
    for steps, sparsity in [] if text is None else parse_schedule(text):
        for step in _numbers("sparsity_schedule", text or "", steps, num_steps, "--sparsity-schedule 0-:0.9"):
            if found[step] is not None:
                raise UsageError(
                    f"sparsity_schedule is {shown(text)}, but gives step {step} two sparsities. Give each step once. "
                    f"{EXAMPLE}"
                )
            found[step] = sparsity
    return tuple(found)


def named_steps(steps: Sequence[int]) -> str:
    """Ascending steps in words: "step 3", or "steps 0-2,7"."""
    return f"step{'s' * (len(steps) > 1)} {as_ranges(steps)}"


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as a text that chooses them: "0-2,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
