"""The options of a command, built for Typer from the fields of its configs; no option is written a second time."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin

import typer

from slagen.attention import registry
from slagen.generation.sizes import clip_size
from slagen.settings import Setting, settings_of, with_complements


@dataclass(frozen=True)
class Fields:
    """Those options of a config that a command has.

    Args:
        config: the dataclass. only: its fields, by name, in the order of the config; empty takes all that have a help.
        without: fields, and options of attention methods, to leave out.
        help: another help for a field. defaults: another default.
    """

    config: type
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    help: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def _fields(self) -> list[Setting]:
        every = settings_of(self.config)
        return [s for s in every if s.field not in self.without and (not self.only or s.field in self.only)]

    def _of_methods(self) -> list[Setting]:
        return [setting for setting in registry.own_settings(self.config) if setting.field not in self.without]

    def settings(self) -> list[Setting]:
        """The options that the command has, those of attention methods among them."""
        found: list[Setting] = []
        for setting in self._fields():
            if setting.about.of_methods:
                for own in self._of_methods():
                    about = dataclasses.replace(own.about, panel=setting.about.panel)
                    found.append(dataclasses.replace(own, about=about))
            elif setting.about.help:
                found.append(setting)
        return found

    def parameters(self) -> list[inspect.Parameter]:
        """A parameter of Typer's for each option."""
        found = []
        for setting in self.settings():
            help, default = self.help.get(setting.field, setting.about.help), self.default(setting)
            if setting.about.is_size:
                found.append(_parameter("size", str, None, _option(setting, help, "--size")))
                for name in ("resolution", "aspect_ratio"):
                    spelling = f"--{name.replace('_', '-')}"
                    found.append(_parameter(name, str, None, typer.Option(spelling, hidden=True)))
                hidden = typer.Option("--width", hidden=True)
                found.append(_parameter(setting.field, setting.kind, default, hidden))
            else:
                found.append(_parameter(setting.field, _kind(setting), default, _option(setting, help)))
            if complement := setting.about.complement:
                repeated = " May be repeated." * _is_list(setting)
                help = f"Fraction of key blocks with exact attention, 1 - sparsity.{repeated}"
                found.append(_parameter(complement, _kind(setting), None, _option(setting, help, f"--{complement}")))
        return found

    def default(self, setting: Setting) -> Any:
        """What an option is where it is not given; None for one of several values."""
        return None if _is_tuple(setting) else self.defaults.get(setting.field, setting.default)

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take the config's values out of what Typer parsed. Raises UsageError."""
        typed = [name for s in self.settings() for name in (s.field, s.about.complement) if name]
        values = with_complements(self.config, {name: given.pop(name) for name in typed})
        for setting in self.settings():
            value, read = values[setting.field], setting.about.read
            if _is_tuple(setting):
                if read is not None and value is not None:
                    values[setting.field] = read(value)
                elif value:
                    values[setting.field] = tuple(value)
                else:
                    del values[setting.field]  # the config's own default
            elif read is not None and value is not None:
                values[setting.field] = read(value)
            if setting.about.is_size:
                names = ("size", "resolution", "aspect_ratio")
                asked = {name: given.pop(name) for name in names}
                values["width"], values["height"] = clip_size(width=value, height=values["height"], **asked)
        for holder in (setting for setting in self._fields() if setting.about.of_methods):
            own = {each.field: values.pop(each.field) for each in self._of_methods()}
            values[holder.field] = tuple((name, value) for name, value in own.items() if value is not None)
        return values


def takes(**slots: Fields | type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of configs.

    Args:
        slots: for a parameter of the command, the config (or `Fields` of one) whose options stand in its place; it is
            called with a dict of the values of these fields.
    """
    fields = {name: slot if isinstance(slot, Fields) else Fields(slot) for name, slot in slots.items()}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name in fields:
                parameters += fields[parameter.name].parameters()
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def command(**given: Any) -> None:
            values = {name: slot.read(given) for name, slot in fields.items()}
            function(**given, **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(name: str, kind: Any, default: Any, about: Any) -> inspect.Parameter:
    annotation: Any = Annotated[kind if default is not None else kind | None, about]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(setting: Setting, help: str, name: str = "") -> Any:
    """An option for Typer: its spellings, help, panel and metavar."""
    about, name = setting.about, name or f"--{setting.name}"
    if setting.kind is bool and setting.default is None:
        name = f"{name}/--no-{setting.name}"
    names = [name, about.short] if about.short else [name]
    return typer.Option(
        *names, help=help, rich_help_panel=about.panel or None, metavar=about.metavar, hidden=about.hidden
    )


def _kind(setting: Setting) -> Any:
    if setting.about.kind is not None:
        return setting.about.kind
    return GenericAlias(list, get_args(setting.kind)[:1]) if _is_list(setting) else setting.kind


def _is_list(setting: Setting) -> bool:
    """Whether it may be repeated."""
    return _is_tuple(setting) and setting.about.read is None


def _is_tuple(setting: Setting) -> bool:
    return get_origin(setting.kind) is tuple and not setting.about.of_methods
