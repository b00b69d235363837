"""Which packages slagen needs, which of them this machine lacks, and how to install them."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OTHER_NAMES = {"yaml": "pyyaml", "pil": "pillow"}  # imported under a name that is not the package's


@cache
def requirements() -> dict[str, str]:
    """The packages that slagen takes and the lowest version of each, as in {"diffusers": ">=0.40"}."""
    project = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout, which may run without being installed
    lines: list[str] = []
    if project.is_file():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = metadata.requires("slagen") or []
    found = {}
    for line in lines:
        package, _, condition = line.partition(";")
        match = re.match(r"([\w.-]+)\s*(.*)", package.strip())
        if match is None or "extra" in condition or ("linux" in condition and sys.platform != "linux"):
            continue
        found[_normal(match[1])] = match[2].strip()
    return found


def state(name: str) -> tuple[str, bool]:
    """What is there of a package, in words, and whether slagen can use it."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed", False
    lowest = requirements().get(_normal(name), "").removeprefix(">=")
    return (f"too old ({version})", False) if _numbers(version) < _numbers(lowest) else (version, True)


def install(name: str) -> str:
    """The command that installs a package, or a version of it that is new enough."""
    return f"pip install '{name}{requirements().get(_normal(name), '')}'"


def explain(error: ImportError) -> str | None:
    """One line on a package of slagen's that could not be imported; None where the failure is another."""
    top = (error.name or "").split(".")[0]
    name = _normal(OTHER_NAMES.get(top.lower(), top))
    if name not in requirements():
        return None
    found, fits = state(name)
    if fits:
        again = install(name).replace("pip install", "pip install --force-reinstall")
        return f"{name} {found} is installed, but cannot be imported ({error}). Try {again}."
    return f"{name} is {found}, but slagen needs {name}{requirements()[name]}. Try {install(name)}."


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> list[int]:
    """The leading numbers of a version: 2.11.0+cu130 is 2, 11, 0."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []


PACKAGES = ("slagen", "torch", "triton", "diffusers", "transformers", "safetensors", "imageio-ffmpeg")


def versions() -> dict[str, str]:
    """Python's and the packages' versions; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
