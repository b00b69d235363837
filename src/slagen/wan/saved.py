"""Record in a transformer's config what its attention was trained with, so that `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict

from slagen.formats.model_files import SETTINGS_KEY, read_json
from slagen.formats.sla_settings import describe_settings


def record_settings(
    transformer: WanTransformer3DModel, method: str, config: Any, family: str, trained: str,
    layers: tuple[float, ...] | None = None, path: Path | None = None,
) -> None:  # fmt: skip
    """Have `save_pretrained` write beside the weights what they were trained with, and, of the slagen.json in the
    folder of the SLA file or of the model, what the model was made for.

    Args:
        method, config, family, trained, layers: as in SLAMetadata. path: of the SLA file, or its folder.
    """
    origin = Path(str(transformer.config.get("_name_or_path") or "."))
    folders = [origin.parent, origin] if path is None else [path if path.is_dir() else path.parent, origin.parent]
    made_for = next((folder / "slagen.json" for folder in folders if (folder / "slagen.json").is_file()), None)
    settings = describe_settings(method, config, family, trained, layers)
    if made_for is not None:
        settings["defaults"] = read_json(made_for, made_for.parent)
    _register(transformer, {SETTINGS_KEY: settings})


def forget_settings(transformer: WanTransformer3DModel) -> None:
    """Have `save_pretrained` write nothing of the attention."""
    _register(transformer, {})


def _register(transformer: WanTransformer3DModel, settings: dict[str, Any]) -> None:
    config = {name: value for name, value in transformer.config.items() if name != SETTINGS_KEY}
    transformer._internal_dict = FrozenDict({**config, **settings})
