"""A file with the sparsity of every layer and of steps, as `slagen tune` writes it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.attention.choices import parse_schedule
from slagen.errors import UsageError
from slagen.io.documents import read_json
from slagen.io.forms import Kind, matching, one_of, whole
from slagen.io.paths import user_path
from slagen.io.reading import kind_of_path

SUFFIX = ".json"
KIND = "sparsity schedule"
VERSION = 1
MAX_LAYERS = 1000
ADVICE = "Give a file that slagen tune wrote, or pairs STEPS:SPARSITY."
SPARSITY = Kind("a number of at least 0 and below 1", float, lambda value: 0 <= value < 1)
LAYERS = Kind(  # as weight files and models name them
    f"a list of 1 to {MAX_LAYERS} sparsities", [SPARSITY], lambda value: 1 <= len(value) <= MAX_LAYERS
)
FORM = {
    "schema_version": int, "kind": one_of(KIND), "method": matching(r"[a-z0-9-]{1,40}", "the name of a method"),
    "num_layers": whole(1, MAX_LAYERS),
    "schedule": [{"steps": matching(r"[-\d%.]{1,12}", "steps such as 0- or 0-9"), "sparsities": [SPARSITY]}],
}  # fmt: skip


@dataclass(frozen=True)
class LayerSchedule:
    """The sparsity of each layer of a model in some denoising steps, or in all.

    Args:
        method: the attention method that it was made for. num_layers: of the model that it was made for.
        parts: steps, as a --sparsity-schedule names them, and the sparsity of each layer in them.
    """

    method: str
    num_layers: int
    parts: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def text(self) -> str:
        """The same as --sparsity-schedule takes it without a file."""
        return ",".join(f"{steps}:{'/'.join(f'{each:.12g}' for each in layers)}" for steps, layers in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """What the file holds of it."""
        return {
            "schema_version": VERSION, "kind": KIND, "method": self.method, "num_layers": self.num_layers,
            "schedule": [{"steps": steps, "sparsities": list(layers)} for steps, layers in self.parts],
        }  # fmt: skip


def read_schedule(path: Path) -> LayerSchedule:
    """A schedule from its file. Raises UsageError where there is none, or it is not of this form and version."""
    if not path.is_file():
        raise UsageError(f"{path} {kind_of_path(path)}. {ADVICE}")
    version = read_json(path, {"schema_version": int, "kind": one_of(KIND)}, UsageError, ADVICE)["schema_version"]
    if version != VERSION:
        raise UsageError(
            f"{path} has schema version {version}, but this version of slagen reads only {VERSION}. Make it again with "
            "slagen tune."
        )
    content = read_json(path, FORM, UsageError, ADVICE)
    parts = tuple((part["steps"], tuple(map(float, part["sparsities"]))) for part in content["schedule"])
    count = content["num_layers"]
    for _, layers in parts:
        if len(layers) != count:
            raise UsageError(f"{path} is for {count} layers, but has {len(layers)} sparsities in a part. {ADVICE}")
    schedule = LayerSchedule(content["method"], count, parts)
    try:
        parse_schedule(schedule.text)
    except UsageError as error:
        raise UsageError(f"{path} is not a sparsity schedule: {error}") from error
    return schedule


def names_file(value: object) -> bool:
    """Whether a --sparsity-schedule is a file's path."""
    return isinstance(value, str) and value.lower().endswith(SUFFIX)


def as_text(value: Any, method: str, option: str = "--attention") -> Any:
    """A --sparsity-schedule without files: what a file says where one is named, anything else as it is.

    Args: method: the attention method that will run. option: which chose it.
    Raises: as `read_schedule`, and UsageError for a schedule of another method.
    """
    if not names_file(value):
        return value
    path = user_path(value)
    found = read_schedule(path)
    if found.method != method:
        raise UsageError(
            f"{path} was tuned for {found.method} attention, but this is {method} attention. Give {option} "
            f"{found.method}, or make a schedule with slagen tune --attention {method}."
        )
    return found.text


def method_of(value: object) -> dict[str, str]:
    """The attention that a --sparsity-schedule needs, as a field of a config; none where it is no file. Raises as
    `read_schedule`."""
    return {"attention": read_schedule(user_path(str(value))).method} if names_file(value) else {}
