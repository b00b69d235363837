"""What SLA weights were trained with, as an SLA file or a model saved by diffusers says it. No torch here."""

from pathlib import Path
from typing import Any

from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.folders import transformer_folder
from slagen.formats.headers import read_header, read_strings
from slagen.formats.model_files import SETTINGS_KEY, SLA_SETTINGS, read_json
from slagen.io import documents


def read_sla_config(path: Path) -> SLAConfig | None:
    """What SLA weights were trained with: an SLA file's metadata say it, or the config.json in a folder where diffusers
    saved them inside a model; None where neither does."""
    try:
        if path.is_dir():
            inner = path / "transformer"
            told = read_json(inner / "config.json", inner)[SETTINGS_KEY]
        else:
            told = read_strings(path, read_header(path)["__metadata__"]["slagen"], {"config": dict})
        return SLAConfig.from_dict(told["config"])
    except (KeyError, UsageError):
        return None


SETTINGS_METADATA = "slagen_transformer"  # in a transformer file's metadata


def read_settings(path: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """What SLA weights inside a transformer were trained with: fields of Found, from the file's metadata or from the
    config.json that diffusers writes beside it; None where neither says it. Raises WeightsError if it cannot be read.
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
        config = SLAConfig.from_dict(told["config"])
    except UsageError as error:
        raise WeightsError(f"{path} has invalid SLA settings: {error} Copy or download it again.") from error
    return {"sla": config, "sampler": "rcm" if told["sampler_family"] == "rcm" else None, "trained": told["trained"]}
