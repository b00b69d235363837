"""The settings that attention weights were trained with, read from slagen's own file or a saved model. No torch."""

from pathlib import Path
from typing import Any, NamedTuple

from slagen.attention.learned import SLA_NAME, check_known, read_config
from slagen.attention.schedule_file import LAYERS
from slagen.errors import UsageError, WeightsError
from slagen.formats.folders import transformer_folder
from slagen.formats.headers import read_header, read_strings
from slagen.formats.model_files import SETTINGS_KEY, SLA_SETTINGS, read_json
from slagen.io import documents
from slagen.io.text import counted
from slagen.settings import to_fields


class TrainedWith(NamedTuple):
    """What attention weights were trained with: their method, its config, and the sparsity of each layer where there
    was not one for all."""

    method: str
    config: Any
    layer_sparsities: tuple[float, ...] | None


def read_trained_with(path: Path) -> TrainedWith | None:
    """What attention weights were trained with.

    They come from the metadata of slagen's own file, or from the config.json of a model in which diffusers saved the
    weights; None if neither has them.
    """
    try:
        if path.is_dir():
            inner = path / "transformer"
            fields = read_json(inner / "config.json", inner)[SETTINGS_KEY]
        else:
            form = {"config": dict, "method?": str, "layer_sparsities?": LAYERS}
            fields = read_strings(path, read_header(path)["__metadata__"]["slagen"], form)
        method = fields.get("method", SLA_NAME)
        return TrainedWith(method, read_config(method, fields["config"]), layers_of(fields))
    except (KeyError, UsageError):
        return None


def layers_of(fields: dict[str, Any]) -> tuple[float, ...] | None:
    """The sparsity of each layer, as a file's settings hold it; None where there was one for all."""
    return tuple(map(float, fields["layer_sparsities"])) if "layer_sparsities" in fields else None


def check_layers(path: str | Path, layers: tuple[float, ...] | None, num_layers: int) -> None:
    """Raise WeightsError for weights with the sparsities of another number of layers than the model has."""
    if layers is not None and len(layers) != num_layers:
        raise WeightsError(
            f"{path} has sparsities for {counted(len(layers), 'layer')}, but this model has {num_layers}. Give weights "
            "for this model."
        )


SETTINGS_METADATA = "slagen_transformer"  # in a transformer file's metadata


def describe_settings(
    method: str, config: Any, family: str, trained: str, layers: tuple[float, ...] | None
) -> dict[str, Any]:
    """The settings of attention weights inside a transformer, in the form that `read_settings` reads.

    Args:
        method, config, family, trained, layers: as in SLAMetadata.
    """
    named: dict[str, Any] = {} if method == SLA_NAME else {"method": method}
    if layers is not None:
        named["layer_sparsities"] = list(layers)
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
    return {
        "trained_with": config, "method": method, "sampler": sampler, "trained": settings["trained"],
        "layer_sparsities": layers_of(settings),
    }  # fmt: skip
