"""Compare the settings of a run with those of the checkpoint that it would resume from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from slagen.attention.choices import for_all_steps
from slagen.errors import UsageError
from slagen.formats.sla import find_sla_file
from slagen.generation.embeddings import file_hashes
from slagen.settings import names_where, settings_of, to_fields
from slagen.training.config import FinetuneConfig
from slagen.training.data.dataset import transformer_files
from slagen.training.lora import LORA_RANK
from slagen.training.setup import Setup

# Settings that do not change what is learnt.
MAY_CHANGE = names_where(FinetuneConfig, lambda option: not (option.pixels and option.in_key))
DEFAULTS = {setting.field: setting.default for setting in settings_of(FinetuneConfig)}


def run_settings(setup: Setup) -> dict[str, Any]:
    """Every setting that changes what is learnt, except the data themselves, as read back from JSON."""
    config, source = setup.config, setup.weights.source
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    del fields["attention_options"]  # they are among the attention's own settings
    fields["lora_rank"] = (config.lora_rank or LORA_RANK) if config.train == "lora" else None
    schedule = {name: value for name, value in dataclasses.asdict(setup.schedule).items() if name not in MAY_CHANGE}
    files, sla = transformer_files(source), setup.weights.sla_path
    if sla is not None and not config.from_dense and (setup.weights.sla_alone or sla.is_file()):
        files.append(find_sla_file(sla) if setup.weights.sla_alone else sla)
    layers = setup.layer_sparsities
    fields["sparsity_schedule"] = None if layers is None else for_all_steps(layers)
    options = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in ("path", "self_generate")}
    return json.loads(json.dumps({
        **fields, **schedule, **to_fields(setup.attention), "data_options": options, "dtype": str(setup.recipe.dtype),
        "model": source.name, "weights_hash": file_hashes(files, setup.cache),
    }))  # fmt: skip


def compare_settings(before: dict[str, Any], now: dict[str, Any], folder: Path, but: tuple[str, ...] = ()) -> None:
    """Raise UsageError where a run would resume with other settings than it started with; `but` are not compared."""
    names = sorted({*before, *now} - {*but})
    before = {**{name: DEFAULTS.get(name) for name in now}, **before}  # an older checkpoint lacks newer settings
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        listed = ", ".join(
            f"{name} was {before.get(name)!r:.40} and is now {now.get(name)!r:.40}" for name in changed[:4]
        )
        raise UsageError(
            f"{folder} holds a run with different settings: {listed}. Give the same settings or another --output, or "
            "start again with --restart."
        )


def compare_data_options(before: dict[str, Any] | None, now: dict[str, Any], folder: Path) -> None:
    """Raise UsageError for options that give other data, before the data are prepared; then their hash is compared."""
    both = {name for name, value in (before or {}).items() if value is not None and now.get(name) is not None}
    compare_settings({name: (before or {})[name] for name in both}, {name: now[name] for name in both}, folder)
