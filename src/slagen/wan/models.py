"""From a preset, a folder or a hub id to a model's folder on this machine, downloaded if need be."""

import dataclasses
from pathlib import Path
from typing import Any

from slagen.errors import UsageError
from slagen.io.paths import user_path
from slagen.wan.folder import BUNDLED, ModelSource, bundled_folder, describe_folder, is_hub_id
from slagen.wan.hub import OnNote, fetch_pipeline, fetch_weights, is_cached
from slagen.wan.presets import CUDA_DEFAULT, PRESETS, local_folder


def resolve_model(
    model: str | None,
    device_type: str,
    *,
    own_transformer: bool = True,
    local_files_only: bool = False,
    on_note: OnNote = lambda text: None,
) -> ModelSource:
    """Find a model's folder, downloading a hub id, and check that it is a Wan2.1 pipeline.

    Args:
        model: a preset, a folder or a hub id; None is TurboWan 1.3B on CUDA and the bundled model elsewhere.
        own_transformer: False where another transformer will be used: its weights are not downloaded.
        local_files_only: download nothing.
        on_note: called with a line of text about each download.
    Raises: UsageError for a name that is none of these, EnvironmentProblem if the hub does not give it, WeightsError if
        the folder holds something else.
    """
    if model is None:
        model = CUDA_DEFAULT if device_type == "cuda" else BUNDLED
    if model == BUNDLED:
        return describe_folder(bundled_folder(), BUNDLED)
    options: dict[str, Any] = {"local_files_only": local_files_only, "on_note": on_note}
    preset = PRESETS.get(model)
    if preset is not None and preset.base is not None:
        weights = None
        if preset.weights is not None and own_transformer:
            weights = fetch_weights(preset.weights, **options)
        folder = fetch_pipeline(preset.base, transformer=own_transformer and weights is None, **options)
        source = describe_folder(folder, preset.name)
        return dataclasses.replace(source, defaults=preset.defaults, weights=weights)
    local = local_folder(model)
    if local is not None:
        return describe_folder(local, local.resolve().name)
    return describe_folder(fetch_pipeline(model, transformer=own_transformer, **options), model)


def check_recorded_model(path: Path, model: str) -> None:
    """Raise UsageError for a hub model that a file names and that would be downloaded: it may be anyone's."""
    known = model in (BUNDLED, *PRESETS) or user_path(model).exists()
    if not known and is_hub_id(model) and not is_cached(model):
        raise UsageError(f"{path} was made with the Hugging Face model {model}. Give --model {model} to download it.")
