"""What `doctor` prints: findings, and the checks of a self-test."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from slagen.cli.console import note, write, write_json, write_table
from slagen.cli.table import Cell, Table
from slagen.io.text import line

if TYPE_CHECKING:
    from slagen.doctor.checks import Finding
    from slagen.doctor.selftest import Check, Selftest


def show_findings(findings: list[Finding], as_json: bool) -> None:
    """Print what `doctor` found: a table on stdout, or JSON alone."""
    if as_json:
        write_json({"findings": [finding.to_dict() for finding in findings]})
        return
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table()
    for finding in findings:
        status = Cell(finding.status, colours[finding.status])
        found = "\n".join(line(text) for text in (finding.found, finding.fix) if text)
        table.add_row(status, finding.name, Cell(found))
    write_table(table)


def show_selftest(result: Selftest, path: Path, as_json: bool) -> None:
    """Print the checks of `doctor --selftest`: a table and the file on stdout, or JSON alone.

    Checks of one backend and dtype that end alike are one line of the table.
    """
    if as_json:
        write_json(result.to_dict())
        note(f"also written to {path}")
        return
    colours = {"ok": "green", "missing": "yellow", "failed": "bold red"}
    table = Table()
    for (name, status, detail), found in groupby(result.checks, _end_of_check):
        checks = list(found)
        several = len(checks) > 1
        seconds = f"{sum(check.seconds for check in checks):.1f} s"
        about = f"{name} ({len(checks)} checks, {seconds})" if several else f"{checks[0].name} ({seconds})"
        table.add_row(Cell(status, colours[status]), f"{about}: {detail}")
    write_table(table)
    write(str(path))


def _end_of_check(check: Check) -> tuple[str, str, str]:
    """The backend and dtype, or what else was tried, and how that ended."""
    return check.name.partition(",")[0], check.status, check.detail
