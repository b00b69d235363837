"""The versions that slagen admits: none with a published vulnerability, and the tested ones among them."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

spec = importlib.util.spec_from_file_location("audit", Path(__file__).parent.parent / "scripts" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

MENDED = {  # the first version without each, as the advisories say
    "accelerate": "1.15",  # CVE-2026-69112, up to 1.14.0
    "filelock": "3.20.3",  # CVE-2025-68146, CVE-2026-22701
    "jinja2": "3.1.6",  # CVE-2025-27516
    "diffusers": "0.38",  # CVE-2026-44513
    "pillow": "13.0",  # CVE-2026-59199 and others in 12.3; CVE-2026-96641 and CVE-2026-112397 in 13.0
    "playwright": "1.64.1",  # CVE-2026-111497, in its Node.js
    "pytest": "9.0.3",  # CVE-2025-71176
    "ray": "2.56",  # CVE-2025-62593, CVE-2026-41486, CVE-2026-57516
    "sentencepiece": "0.2.1",  # CVE-2026-1260
    "torch": "2.10",  # CVE-2026-24747; two later ones are of torch.jit and .pt2, which slagen never loads
    "transformers": "5.10",  # CVE-2026-4372, CVE-2026-5241, CVE-2026-9856
}


def numbers(version):
    return [int(number) for number in version.split(".")]


@pytest.mark.parametrize("name", MENDED)
def test_no_version_with_a_known_vulnerability_is_admitted(name):
    assert numbers(audit.lowest()[name]) >= numbers(MENDED[name])


def test_what_is_tested_is_admitted():
    pinned = audit.pinned()
    low = {name: version for name, version in audit.lowest().items() if name in pinned}
    assert len(low) > 20
    assert [name for name in low if numbers(pinned[name]) < numbers(low[name])] == []


@pytest.mark.parametrize(
    ("out", "error", "code", "said"),
    [
        ({"dependencies": [{"name": "ray", "version": "2.50", "vulns": [{"id": "X-1", "fix_versions": ["2.52"]}]}]},
         "", 1, "ray 2.50: X-1, fixed in 2.52"),
        ({"dependencies": [{"name": "ray", "version": "2.56", "vulns": []}]}, "", 0, "have no known vulnerabilities"),
        ({"dependencies": [{"name": "ray", "skip_reason": "not found"}]}, "", 0, "skipped for the tested versions"),
        (None, "Traceback\nConnectionError: no route", 0, "skipped for the tested versions: ConnectionError"),
    ],
    ids=["vulnerable", "clean", "no-data", "offline"],
)  # fmt: skip
def test_the_audit_fails_for_vulnerabilities_and_for_nothing_else(monkeypatch, capsys, out, error, code, said):
    done = SimpleNamespace(stdout=json.dumps(out) if out else "", stderr=error)
    monkeypatch.setattr(audit.shutil, "which", lambda name: "pip-audit")
    monkeypatch.setattr(audit.subprocess, "run", lambda *a, **k: done)
    assert audit.main() == code
    assert said in capsys.readouterr().out


def test_without_pip_audit_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(audit.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(audit.shutil, "which", lambda name: None)
    assert audit.main() == 0
    assert capsys.readouterr().out.count("\n") == 1
