"""What attention a run has, and where its weights lie: by names and metadata, without reading them."""

from pathlib import Path
from typing import Any

from slagen.attention import registry
from slagen.attention.learned import SLA_NAME, label, of_another, suits
from slagen.errors import UsageError, WeightsError
from slagen.formats.model_files import SLA_FILE
from slagen.formats.peek import Found, lacks_settings, peek
from slagen.formats.sla import read_metadata
from slagen.formats.sla_settings import check_layers
from slagen.generation.config import GenerateConfig
from slagen.io.paths import user_path
from slagen.wan.folder import ModelSource
from slagen.wan.presets import never_tuned


def look_at_weights(path: Path) -> Found:
    """What --weights names. A folder may hold a transformer, SLA weights, or, as `slagen convert` writes it, both."""
    if path.is_dir() and not (path / "transformer").is_dir() and (path / SLA_FILE).is_file():
        return Found("sla")
    return peek(path)


def plan_attention(
    config: GenerateConfig, source: ModelSource, found: Found | None
) -> tuple[Any, Path | None, bool, bool, tuple[float, ...] | None]:
    """What attention to run and from where.

    Returns: the config that its weights were trained with, the method's own where it needs some and runs without, None
        where it has none and needs none; their file (None without any); whether that is a file of slagen's own;
        whether the weights in all are distilled for rCM; and the sparsity that each layer was trained with, where that
        was not one for all.
    Raises: WeightsError where a method needs weights and there are none, or ones of another method or of one branch of
        SLA alone; UsageError where weights are given that are of another method.
    """
    method = registry.get(config.attention)
    given = found is not None and found.kind in ("sla", "side-file")
    path, alone = _attention_file(config, source, found)
    own = source.folder / "transformer"
    if path is not None:
        inside = None if alone else found
    elif source.weights is not None:
        inside = peek(source.weights)
    else:  # diffusers may have saved attention weights with the model itself
        inside = peek(own) if any(own.glob("*.safetensors")) else None
    if path is None and inside is not None and inside.trained_with is not None:
        path, alone = source.weights or own, False
    metadata = read_metadata(path) if path is not None and alone else None
    if metadata is not None:
        distilled = metadata.sampler_family == "rcm"
    elif source.weights is not None or (inside is not None and inside.trained_with is not None and not given):
        distilled = inside is not None and inside.sampler == "rcm"
    else:
        distilled = source.defaults.sampler == "rcm"
    of = metadata.method if metadata is not None else SLA_NAME if inside is None else inside.method
    if not suits(method, of):
        if given:
            raise UsageError(
                f"{method.name} attention does not use {label(of)} weights. Leave --weights out, or give --attention "
                f"{of}."
            )
        if path is not None and method.needs.weights and not config.allow_untrained:
            raise of_another(path, method, of)
        path = None
    elif inside is not None and inside.lacks_settings:
        raise WeightsError(f"{source.weights or source.folder} {lacks_settings(inside.method)}")
    if path is None:
        if method.needs.weights and not config.allow_untrained:
            raise never_tuned(source.name, method)
        return method.config() if method.needs.weights else None, None, True, distilled, None
    about = metadata or inside
    assert about is not None
    branch = about.trained.rpartition(", ")[2]
    if branch in ("linear", "sparse") and config.attention == "sla" and not config.allow_untrained:
        raise WeightsError(
            f"{path} was trained with the {branch} branch only, and the other branch would degrade the video. Use "
            f"--attention {branch}, or run it anyway with --allow-untrained."
        )
    check_layers(path, about.layer_sparsities, source.shape.num_layers)
    trained_with = about.trained_with if isinstance(about, Found) else about.config
    return trained_with, path, metadata is not None, distilled, about.layer_sparsities


def _attention_file(config: GenerateConfig, source: ModelSource, found: Found | None) -> tuple[Path | None, bool]:
    """The file with the attention's weights alone, given or beside the model, and whether it is slagen's own."""
    if found is not None and found.kind in ("sla", "side-file"):
        return user_path(config.weights or ""), found.kind == "sla"
    if found is None and source.weights is None and (source.folder / SLA_FILE).is_file():
        return source.folder / SLA_FILE, True
    if source.weights is not None and source.weights.is_dir() and (source.weights / SLA_FILE).is_file():
        return source.weights / SLA_FILE, True
    return None, True
