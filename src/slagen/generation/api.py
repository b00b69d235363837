"""slagen.generate: a prompt becomes videos, from Python."""

from __future__ import annotations

import logging
import numbers
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slagen.attention import registry
from slagen.errors import UsageError, worded
from slagen.events import Event
from slagen.generation import peers
from slagen.generation.config import GenerateConfig
from slagen.generation.preflight import check_run
from slagen.generation.result import GenerateResult
from slagen.io.forms import shown
from slagen.settings import no_argument, settings_of, with_complements

LOGGER = logging.getLogger("slagen")
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


def generate(
    prompt: str,
    *,
    output: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    **settings: Any,
) -> GenerateResult:
    """Make one or more videos of a prompt, as `slagen generate` does.

    Args:
        prompt: what the video shows.
        output: a path that ends in .mp4, .webm or .gif is the file, one that ends in .frames a folder of PNG files, any
            other a folder for videos; each video is written with its report. None writes nothing: the frames are in the
            result.
        on_event: called with every `slagen.events.Event`: stages, steps, notes and warnings. None: warnings are
            Python's, and notes go to the logger "slagen".
        settings: any field of `GenerateConfig`: model, seed, num_videos, width, height, num_frames, steps, sparsity (or
            keep, which is 1 - sparsity), attention, device and so on; and the options of the attention method. What is
            left out is the model's own default.
    Returns: the videos, with frames (T, H, W, 3) uint8, report and paths.
    Raises: TypeError for an argument that there is not, SlagenError for all else that cannot be: UsageError for a value
        that cannot work, WeightsError for weights that do not fit, EnvironmentProblem for what this machine lacks.
    """
    config = _config({"prompt": prompt, "output": output, **settings})
    check_run(config)
    from slagen.generation.generate import generate as run  # with torch, once what is cheap to check is checked

    return run(config, on_event or _log, from_python=True, write=output is not None)


def _config(given: dict[str, Any]) -> GenerateConfig:
    own, given = registry.own_settings(GenerateConfig), with_complements(GenerateConfig, given)
    known = {setting.field: setting.kind for setting in (*settings_of(GenerateConfig), *own)}
    for name in given.keys() - known.keys():
        raise no_argument("generate", name, known.keys() - {"prompt"}, **_instead(name, set(known)))
    if not isinstance(given["prompt"], str):
        raise UsageError(f"prompt is {shown(given['prompt'])}, but must be a string.")
    values = {name: _plain(name, value, known[name]) for name, value in given.items() if value is not None}
    if given.get("save_latents") and given["output"] is None:
        raise UsageError("--save-latents writes a file, but there is no output. Give a path with --output.")
    if given.get("preview") and given["output"] is None:
        raise UsageError("--preview writes a file, but there is no output. Give a path with --output.")
    if given.get("cfg_parallel"):
        raise UsageError(
            "--cfg-parallel is for the command under torchrun, and a call from Python runs in one process. Leave "
            "--cfg-parallel out."
        )
    options = {setting.field: values.pop(setting.field) for setting in own if setting.field in values}
    if options:
        values["attention_options"] = tuple({**dict(values.get("attention_options", ())), **options}.items())
    return GenerateConfig(**values)


def _instead(name: str, known: set[str]) -> dict[str, str]:
    """What `no_argument` says of another tool's argument."""
    if reason := peers.REFUSED.get(name.replace("_", "-")):
        return {"reason": f": {worded(reason)}."}
    if name.replace("_", "-") in peers.SET_IN_TRAINING:
        return {"reason": ". It is an option for training only; use it with slagen finetune."}
    if name in ("size", "resolution"):
        return {"reason": ". Give width and height."}
    ours = peers.normalize(name).replace("-", "_")
    return {"ours": ours} if ours in known else {}


def _plain(name: str, value: Any, kind: Any) -> Any:
    """A value as a config keeps it: NumPy's numbers as Python's, paths as strings. Raises UsageError."""
    if isinstance(value, Path) and kind is str:
        return str(value)
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if kind in KINDS and type(value) is not kind:
        raise UsageError(f"{name} is {shown(value)}, but must be {KINDS[kind]}.")
    return value


def _log(event: Event) -> None:
    if event.kind == "warning":
        warnings.warn(worded(event.text), stacklevel=2)
    elif event.kind == "note":
        LOGGER.info("%s", worded(event.text))
