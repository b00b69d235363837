"""How the arguments of a command are parsed, and what its help has."""

import math
from typing import Any, cast

from typer.core import TyperCommand, TyperGroup

from slagen.cli.config_file import CONFIG, read_config
from slagen.cli.help import HelpText
from slagen.cli.ranks import check_command
from slagen.errors import UsageError
from slagen.generation import peers
from slagen.io.text import cut

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Help:
    """Help in plain text, with the options by panel: rich takes longer to import than all the rest of it.

    Other tools' spellings are put into ours before anything is parsed. And no option takes what Python calls a number
    but no setting is: nan, inf, or more digits than 64 bits hold. What --config names is parsed before what is typed.
    """

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        takes_value = {
            name: not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for parameter in self.get_params(context)  # type: ignore[attr-defined]
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        is_group = isinstance(self, TyperGroup)
        args = peers.translate(args, takes_value, _note, is_group=is_group)
        file = None
        if CONFIG in takes_value and not context.resilient_parsing:
            file = read_config(args, self.params, context.command_path, is_group=is_group)  # type: ignore[attr-defined]
        if file is None:
            return cast(list[str], super().parse_args(context, args))  # type: ignore[misc]
        context.meta[CONFIG] = file
        try:
            args = [*peers.translate(file.arguments, takes_value, _note), *args]
            return cast(list[str], super().parse_args(context, args))  # type: ignore[misc]
        except UsageError as error:
            file.name_in(error)
            raise
        except Exception as error:
            file.explain(error)
            raise

    def invoke(self, context: Any) -> Any:
        for parameter in self.params:  # type: ignore[attr-defined]
            value = context.params.get(parameter.name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(number, int | float) or -(2**63) <= number < 2**63 or parameter.name == "seed":
                    continue  # a seed's own check names its bounds
                wanted = "between -2**63 and 2**63" if math.isfinite(number) else "a finite number"
                raise UsageError(
                    f"{parameter.opts[0]} is {cut(str(number), 40)}, but must be {wanted}. "
                    f"See {context.command_path} --help."
                )
        try:
            return super().invoke(context)  # type: ignore[misc]
        except UsageError as error:
            if (file := context.meta.get(CONFIG)) is not None:
                file.name_in(error)
            raise

    def get_help(self, context: Any) -> str:
        text = HelpText()
        self.format_help(context, text)  # type: ignore[attr-defined]
        return str(text)

    def format_options(self, context: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(context):  # type: ignore[attr-defined]
            record = parameter.get_help_record(context)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        if isinstance(self, TyperGroup):
            commands = [self.commands[name] for name in self.list_commands(context)]
            panels["Commands"] = [(c.name or "", (c.help or "").split("\n\n")[0].replace("\n", " ")) for c in commands]
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class Command(Help, TyperCommand):
    def invoke(self, context: Any) -> Any:
        check_command(context.command_path)
        return super().invoke(context)


class Group(Help, TyperGroup):
    pass


def _note(text: str) -> None:
    from slagen.cli import console

    console.note(text)
