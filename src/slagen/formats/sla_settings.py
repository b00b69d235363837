"""What attention weights were trained with, as slagen's own file or a model saved by diffusers says it. No torch."""

from pathlib import Path
from typing import Any

from slagen.attention.learned import SLA_NAME, read_config, to_fields
from slagen.errors import UsageError, WeightsError
from slagen.formats.folders import transformer_folder
from slagen.formats.headers import read_header, read_strings
from slagen.formats.model_files import SETTINGS_KEY, SLA_SETTINGS, read_json
from slagen.io import documents


def read_trained_with(path: Path) -> tuple[str, Any] | None:
    """The attention method that weights are of, and the config they were trained with: the metadata of slagen's own
    file say it, or the config.json in a folder where diffusers saved them inside a model; None where neither does."""
    try:
        if path.is_dir():
            inner = path / "transformer"
            told = read_json(inner / "config.json", inner)[SETTINGS_KEY]
        else:
            told = read_strings(path, read_header(path)["__metadata__"]["slagen"], {"config": dict, "method?": str})
        method = told.get("method", SLA_NAME)
        return method, read_config(method, told["config"])
    except (KeyError, UsageError):
        return None


SETTINGS_METADATA = "slagen_transformer"  # in a transformer file's metadata


def describe_settings(method: str, config: Any, family: str, trained: str) -> dict[str, Any]:
    """What `read_settings` reads of attention weights inside a transformer.

    Args:
        method, config, family, trained: as in SLAMetadata.
    """
    named = {} if method == SLA_NAME else {"method": method}
    return {"config": to_fields(config), "sampler_family": family, "trained": trained, **named}


def read_settings(path: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """What attention weights inside a transformer were trained with: fields of Found, from the file's metadata or from
    the config.json that diffusers writes beside it; None where neither says it. Raises WeightsError if it cannot be
    read.
    """
    folder = transformer_folder(path) if path.is_dir() else path.parent
    told = None
    if SETTINGS_METADATA in metadata:
        told = read_strings(path, metadata[SETTINGS_METADATA], SLA_SETTINGS)
    elif (folder / "config.json").is_file():
        told = documents.read_json(folder / "config.json", {f"{SETTINGS_KEY}?": SLA_SETTINGS}).get(SETTINGS_KEY)
    if told is None:
        return None
    try:
        method = told.get("method", SLA_NAME)
        config = read_config(method, told["config"])
    except UsageError as error:
        raise WeightsError(f"{path} has invalid attention settings: {error} Copy or download it again.") from error
    sampler = "rcm" if told["sampler_family"] == "rcm" else None
    return {"trained_with": config, "method": method, "sampler": sampler, "trained": told["trained"]}
