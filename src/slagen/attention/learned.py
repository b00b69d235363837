"""Attention methods as weight files know them: whose weights suit which, and what they were trained with. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from slagen.attention import registry
from slagen.attention.protocol import Method
from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.io.forms import Fault, check, one_of
from slagen.io.text import cut
from slagen.settings import Setting, settings_of

SLA_NAME = "sla"  # of files that name no method


def name_in_files(method: Method) -> str:
    """The method that weight files name: "sla" for its branches too, whose weights have the same form."""
    return SLA_NAME if method.config is SLAConfig else method.name


def suits(method: Method, name: str) -> bool:
    """Whether weights of the method of a name suit a method: those of methods that share a config do."""
    return name in registry.METHODS and registry.METHODS[name].config is method.config


def label(name: str) -> str:
    """What messages call the method of a name: "SLA", for its branches too, or "NAME attention"."""
    return "SLA" if suits(registry.METHODS[SLA_NAME], name) else f"{name} attention"


def of_another(path: object, method: Method, name: str) -> WeightsError:
    """The error for weights of the method `name` where another method runs."""
    return WeightsError(
        f"{path} holds {label(name)} weights, which do not work with {label(method.name)}. Give --attention {name}, or "
        "other weights."
    )


def check_known(path: object, name: str) -> None:
    """Raise WeightsError for weights of an attention method that this version does not have."""
    if name not in registry.METHODS:
        raise WeightsError(
            f"{path} holds weights for {cut(name)} attention, which this version of slagen does not have. Upgrade "
            "slagen."
        )


def read_config(name: str, fields: Any) -> Any:
    """The config of the method `name`, from what `to_fields` returned. A missing field has its default, except for SLA.

    Raises: UsageError for a method that is unknown or dense, a field that its config does not have, or a value that it
        refuses.
    """
    if name not in registry.METHODS:
        raise UsageError(f"{cut(name)} attention is unknown")
    if registry.METHODS[name].family == "dense":
        raise UsageError(f"{name} attention has no weights of its own")
    config = registry.METHODS[name].config
    if config is SLAConfig:
        return SLAConfig.from_dict(fields)
    settings = {setting.field: setting for setting in settings_of(config)}
    try:
        check(fields, {f"{field}?": _form(setting) for field, setting in settings.items()})
    except Fault as fault:
        raise UsageError(f"the {name} setting {fault}") from fault
    if unknown := sorted(fields.keys() - settings.keys()):
        raise UsageError(
            f"{name} attention has no setting {unknown[0][:60]}; its settings are {', '.join(settings) or 'none'}"
        )
    return config(**{field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()})


def _form(setting: Setting) -> Any:
    """The form of a config's field in JSON, as for `io.forms.check`; the config itself checks what else there is."""
    if get_origin(setting.kind) is Literal and all(isinstance(choice, str) for choice in get_args(setting.kind)):
        return one_of(*get_args(setting.kind)) if setting.default is not None else object
    if setting.kind in (int, float, bool, str):
        return setting.kind if setting.default is not None else setting.kind | None
    return object


def differences(config: Any, trained: Any) -> list[str]:
    """What to say of weights that were trained with other settings: from the config, or for each of its own fields."""
    if isinstance(config, SLAConfig):
        return config.differences(trained)
    pairs = [(s.field, getattr(trained, s.field), getattr(config, s.field)) for s in settings_of(type(config))]
    return [
        f"the weights were trained with {name} {old}, but this run uses {new}" for name, old, new in pairs if old != new
    ]


def owner(key: str) -> str | None:
    """The name in files of the method that a transformer's parameter belongs to, by its key; None for the model's."""
    found = next((method for method in registry.METHODS.values() if method.group(key) is not None), None)
    return None if found is None else name_in_files(found)


def matrix_norms(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """The Frobenius norms of what a method learned, by parameter group and in the layers' order; biases are left out.

    Args:
        tensors: of a transformer, by name. What no method knows is left out.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for name, tensor in tensors.items():
        group = registry.parameter_group(name)
        layer = re.match(r"blocks\.(\d{1,9})\.", name)
        if group is None or layer is None or name.endswith(".bias"):
            continue
        layers = found.setdefault(group.name, {})
        layers.setdefault(int(layer[1]), []).append(tensor.double().norm().item())
    return {group: [math.hypot(*layers[layer]) for layer in sorted(layers)] for group, layers in found.items()}
