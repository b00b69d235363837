"""Look up published vulnerabilities of the tested versions, and of the lowest versions that pyproject.toml allows.

`make check` runs it. The data come from the network through pip-audit: where that is not installed, or gets no data,
one line says so and the check passes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120


def lowest() -> dict[str, str]:
    """The lowest version that pyproject.toml admits of each package, the extras' among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def pinned() -> dict[str, str]:
    """The versions that are tested."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def audit(versions: dict[str, str], program: str) -> tuple[list[str], str]:
    """A line for each vulnerability of these versions, and why nothing was learnt, if so."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        command = [program, "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-r", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return [], f"pip-audit did not answer within {TIMEOUT_S} s"
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return [], (done.stderr.strip().splitlines() or ["pip-audit gave no answer"])[-1][:200]
    if all("vulns" not in row for row in rows):
        return [], "the package index has no data on vulnerabilities"
    return [
        f"{row['name']} {row['version']}: {vulnerability['id']}, fixed in {', '.join(vulnerability['fix_versions'])}"
        for row in rows
        for vulnerability in row.get("vulns", [])
    ], ""


def main() -> int:
    """Print what was found; 1 where a version has a vulnerability."""
    beside = Path(sys.executable).parent / "pip-audit"
    program = str(beside) if beside.is_file() else shutil.which("pip-audit")
    if program is None:
        print("audit: skipped, because pip-audit is not installed (pip install pip-audit)")
        return 0
    code = 0
    for what, versions in (("tested", pinned()), ("lowest", lowest())):
        found, lack = audit(versions, program)
        for line in found:
            print(f"audit: the {what} version {line}")
        if found:
            code = 1
        elif lack:
            print(f"audit: skipped for the {what} versions: {lack}")
        else:
            print(f"audit: the {len(versions)} {what} versions have no known vulnerabilities")
    return code


if __name__ == "__main__":
    sys.exit(main())
