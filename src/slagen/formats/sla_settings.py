"""The settings that attention weights were trained with, read from slagen's own file or a saved model. No torch."""

from pathlib import Path
from typing import Any

from slagen.attention.learned import SLA_NAME, check_known, read_config
from slagen.errors import UsageError, WeightsError
from slagen.formats.folders import transformer_folder
from slagen.formats.headers import read_header, read_strings
from slagen.formats.model_files import SETTINGS_KEY, SLA_SETTINGS, read_json
from slagen.io import documents
from slagen.settings import to_fields


def read_trained_with(path: Path) -> tuple[str, Any] | None:
    """The attention method of weights, and the config that they were trained with.

    They come from the metadata of slagen's own file, or from the config.json of a model in which diffusers saved the
    weights; None if neither has them.
    """
    try:
        if path.is_dir():
            inner = path / "transformer"
            fields = read_json(inner / "config.json", inner)[SETTINGS_KEY]
        else:
            fields = read_strings(path, read_header(path)["__metadata__"]["slagen"], {"config": dict, "method?": str})
        method = fields.get("method", SLA_NAME)
        return method, read_config(method, fields["config"])
    except (KeyError, UsageError):
        return None


SETTINGS_METADATA = "slagen_transformer"  # in a transformer file's metadata


def describe_settings(method: str, config: Any, family: str, trained: str) -> dict[str, Any]:
    """The settings of attention weights inside a transformer, in the form that `read_settings` reads.

    Args:
        method, config, family, trained: as in SLAMetadata.
    """
    named = {} if method == SLA_NAME else {"method": method}
    return {"config": to_fields(config), "sampler_family": family, "trained": trained, **named}


def read_settings(path: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of Found that say how the attention weights in a transformer were trained.

    They come from the file's metadata, or from the config.json that diffusers writes beside it; None if neither has
    them. Raises WeightsError if they cannot be read.
    """
    folder = transformer_folder(path) if path.is_dir() else path.parent
    settings = None
    if SETTINGS_METADATA in metadata:
        settings = read_strings(path, metadata[SETTINGS_METADATA], SLA_SETTINGS)
    elif (folder / "config.json").is_file():
        settings = documents.read_json(folder / "config.json", {f"{SETTINGS_KEY}?": SLA_SETTINGS}).get(SETTINGS_KEY)
    if settings is None:
        return None
    method = settings.get("method", SLA_NAME)
    check_known(path, method)
    try:
        config = read_config(method, settings["config"])
    except UsageError as error:
        fault = str(error).removesuffix(".")
        raise WeightsError(f"{path} has invalid attention settings ({fault}). Copy or download it again.") from error
    sampler = "rcm" if settings["sampler_family"] == "rcm" else None
    return {"trained_with": config, "method": method, "sampler": sampler, "trained": settings["trained"]}
