"""Every attention method by name. A new one is its own module, and one line here. No torch here."""

from __future__ import annotations

import copyreg
import dataclasses
from collections.abc import Iterable
from typing import Any

from slagen.attention.delta.method import DELTA, with_delta
from slagen.attention.dense.method import DENSE
from slagen.attention.mean.method import MEAN, SOL
from slagen.attention.nabla.method import NABLA
from slagen.attention.protocol import Addition, Method, ParameterGroup
from slagen.attention.radial.method import RADIAL
from slagen.attention.rettention.method import RETTENTION
from slagen.attention.selectors import SELECTORS
from slagen.attention.sla.method import LINEAR, SLA, SPARSE
from slagen.attention.sla2.method import SLA2
from slagen.attention.vsa.method import VSA
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.text import counted
from slagen.settings import Setting, settings_of

METHODS: dict[str, Method] = {}
ADDITIONS: dict[str, Addition] = {each.name: each for each in (DELTA, *SELECTORS)}


def register(method: Method) -> None:
    """Add a method.

    Raises: ValueError if its name is taken, or if one of its options or parameter groups has the name of another
        method's and is not the same: the command line and files know each name once.
    """
    if method.name in METHODS:
        raise ValueError(f"an attention method {method.name!r} is already registered. Give another name.")
    for other in METHODS.values():
        _check_shared(method, other)
    METHODS[method.name] = method


def _check_shared(method: Method, other: Method) -> None:
    """Raise ValueError where two methods, of different configs, call different things by one name."""
    if other.config is method.config:
        return
    options = {setting.field: setting for setting in settings_of(other.config) if setting.about.help}
    for setting in settings_of(method.config):
        known = options.get(setting.field, setting)
        if setting.about.help and (setting.kind, setting.about) != (known.kind, known.about):
            raise ValueError(
                f"{setting.field} is already an option of {other.name} attention, with another type or help text. "
                f"Use the same type and help text in {method.name} attention, or another name."
            )
    for name in {group.name for group in method.parameters} & {group.name for group in other.parameters}:
        raise ValueError(
            f"{name} is a parameter group of both {method.name} and {other.name} attention. Give it another name."
        )


def names() -> tuple[str, ...]:
    """The names of all methods, as `--attention` takes them."""
    return tuple(METHODS)


def get(name: str) -> Method:
    """The method of a name. Raises UsageError for one that there is not."""
    if name in ADDITIONS:
        added = ADDITIONS[name]
        does = "corrects another method" if added.kind == "wrapper" else "selects key blocks for another method"
        raise UsageError(f"attention is {name!r}, but {name} {does}. Try --attention {added.beside} {added.example}.")
    if name not in METHODS:
        raise UsageError(f"attention is {shown(name)}, but must be one of {', '.join(METHODS)}.")
    return METHODS[name]


def _unpickled(name: str, delta: int | None) -> Method:
    return with_delta(get(name), delta)


# A pickled transformer names its method.
copyreg.pickle(Method, lambda method: (_unpickled, (method.name, method.delta)))


def describe() -> list[dict[str, Any]]:
    """Every method, and what is added to one, as `slagen methods` lists it."""
    return [method.to_dict() for method in METHODS.values()] + [each.to_dict() for each in ADDITIONS.values()]


methods = describe  # as `slagen.methods`


def with_option(name: str) -> list[str]:
    """The names of the methods that have an option."""
    return [method.name for method in METHODS.values() if name in method.option_names]


def without_effect(options: Iterable[str]) -> list[str]:
    """What to say of methods' options that only training uses, where nothing is trained."""
    known = {each.field for method in METHODS.values() for each in settings_of(method.config) if each.about.training}
    return [
        f"--{name.replace('_', '-')} has no effect here, because only slagen finetune uses it"
        for name in options if name in known
    ]  # fmt: skip


def takers(name: str) -> str:
    """Which methods have an option, in a few words."""
    first, *others = with_option(name) or ["no method"]
    return f"{first} and {counted(len(others), 'other method')}" if others else first


def own_settings(config: type) -> list[Setting]:
    """The options that methods' configs describe, and a command's own config does not have: each once, None by default.

    Args:
        config: of the command. A field of a method's config with the name of one of its settings is that setting.
    """
    taken = {name for setting in settings_of(config) for name in (setting.field, setting.name)}
    trained = any(setting.about.trainable for setting in settings_of(config))
    found: dict[str, Setting] = {}
    for method in METHODS.values():
        if trained and not any(backend.backward for backend in method.backends):
            continue
        for setting in settings_of(method.config):
            if setting.about.help and not {setting.field, setting.name} & taken:
                *others, last = with_option(setting.field)
                names = f"{', '.join(others)} and {last}" if others else last
                help = f"{setting.about.help} For {names} attention."
                hidden = setting.about.hidden or (setting.about.training and not trained)
                about = dataclasses.replace(setting.about, help=help, hidden=hidden)
                found.setdefault(setting.field, dataclasses.replace(setting, default=None, about=about))
    return list(found.values())


def of_branches(branches: str) -> Method:
    """The method of SLA that computes "both" branches, "sparse" or "linear"."""
    return get("sla" if branches == "both" else branches)


def backend_names() -> tuple[str, ...]:
    """The names of all methods' backends, once each."""
    return tuple(dict.fromkeys(backend.name for method in METHODS.values() for backend in method.backends))


def parameter_group(key: str) -> ParameterGroup | None:
    """The group that a transformer's parameter belongs to, by its key; None for the model's own."""
    return next((group for method in METHODS.values() if (group := method.group(key)) is not None), None)


register(SLA)
register(SPARSE)
register(LINEAR)
register(SLA2)
register(MEAN)
register(SOL)
register(DENSE)
register(VSA)
register(RADIAL)
register(NABLA)
register(RETTENTION)
