"""Compare the settings of a run with those of the checkpoint that it would resume from."""

from pathlib import Path
from typing import Any

from slagen.errors import UsageError
from slagen.settings import names_where, settings_of
from slagen.training.config import FinetuneConfig

ANYTIME = names_where(FinetuneConfig, lambda option: not (option.pixels and option.in_key))  # learns the same
DEFAULTS = {setting.field: setting.default for setting in settings_of(FinetuneConfig)}


def compare_settings(before: Any, now: dict[str, Any], folder: Path, but: tuple[str, ...]) -> None:
    """Raise UsageError where a run would go on with other settings than it began with, some of them apart."""
    if not isinstance(before, dict):
        raise UsageError(f"{folder} holds a checkpoint without settings. Begin anew with --restart.")
    names = sorted({*before, *now} - {*but})
    before = {**{name: DEFAULTS.get(name) for name in now}, **before}  # an older checkpoint lacks what is new
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r:.40} and is {now.get(name)!r:.40}" for name in changed[:4])
        raise UsageError(
            f"{folder} holds a run with other settings: {told}. Give the same ones, another --output, or begin anew "
            "with --restart."
        )
