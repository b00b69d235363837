"""The pages of docs/ and README say what is so: made parts, links, messages, exit codes, tables, numbers, pictures."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doc_pages import PAGES, ROOT, read

from slagen import errors
from slagen.generation import peers

sys.path.insert(0, str(ROOT / "scripts"))
from docs_pages import PART, renewed  # noqa: E402

SOURCE = ROOT / "src" / "slagen"


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_of_the_code_is_up_to_date(name):
    text = read(name)
    assert renewed(text) == text, "run python scripts/docs_pages.py"


def test_made_parts_are_found():
    parts = [found[2] for name in PAGES for found in PART.finditer(read(name))]
    assert len(parts) > 20 and parts.count("command line") == 1
    assert renewed(read("docs/command-line.md").replace("Denoising steps.", "Steps.")) == read("docs/command-line.md")


def test_every_page_is_in_the_navigation():
    found = re.findall(r"[\w-]+\.md", str(yaml.safe_load(read("mkdocs.yml"))["nav"]))
    assert sorted(found) == sorted(Path(name).name for name in PAGES if name.startswith("docs/"))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Markdown makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(text), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    text = without_blocks(read(name))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def strings_of_the_source() -> str:
    """All text of the code, with the gaps of f-strings as {}."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    said, text = strings_of_the_source(), read("docs/troubleshooting.md")
    messages = re.findall(r"^- \*\*`(.+?)`\*\*", text, re.M)
    assert len(messages) >= 20
    assert [message for message in messages if message not in said] == []


@pytest.mark.parametrize("name", ["docs/troubleshooting.md"])
def test_exit_codes_are_those_of_the_code(name):
    codes, waiting = {0, 3, 130}, [errors.SlagenError]
    while waiting:
        kind = waiting.pop()
        codes.add(kind.exit_code)
        waiting += kind.__subclasses__()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", read(name), re.M)} == codes


def test_the_option_tables_of_other_tools_are_those_that_slagen_understands():
    rows = re.findall(r"^\| `--([\w-]+)` \| (?:`--([\w-]+)`|(not there)) \|$", read("docs/coming-from.md"), re.M)
    assert len(rows) > 50
    for theirs, ours, absent in rows:
        if absent:
            assert peers.why_not(theirs), theirs
        elif theirs == "task":  # whose value names a model
            assert ours == "model"
        else:
            assert ours in (peers.normalize(theirs), peers.normalize(theirs, is_training=True)), theirs


# Numbers that were not measured here: what they are.
GIVEN = {
    "24 GB": "the memory of a card by its maker",
    "6 GB": "computed by slagen plan",
    "1 GiB": "the limit of the kept prompts",
    "1.16 ms": "estimated by slagen doctor --kernels",
    "1.03 ms": "estimated by slagen doctor --kernels",
}
MEASURED = re.compile(
    r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)\s?(?:s|ms|minutes|GiB|GB|dB)(?![\w-])|(\d+\.\d+|\d+)x(?![\w\d])"
)


def values(found: object) -> list[float]:
    """Every number in a JSON."""
    if isinstance(found, dict):
        return [number for part in found.values() for number in values(part)]
    if isinstance(found, list):
        return [number for part in found for number in values(part)]
    return [float(found)] if isinstance(found, int | float) and not isinstance(found, bool) else []


def unproved(text: str) -> list[str]:
    """Measured numbers of a page that are in no file of benchmarks/results which their paragraph or section names."""
    text, found = PART.sub("", without_blocks(text)), []
    for section in re.split(r"^#+ ", text, flags=re.M):
        known = [
            number
            for file in set(re.findall(r"benchmarks/results/[\w./-]+\.json", section))
            for number in values(json.loads(read(file)))
        ]
        for match in MEASURED.finditer(section):
            number = (match[1] or match[2]).replace(",", "")
            digits = len(number.partition(".")[2])
            if match[0] not in GIVEN and not any(f"{value:.{digits}f}" == number for value in known):
                found.append(match[0])
    return found


@pytest.mark.parametrize("name", PAGES)
def test_measured_numbers_are_in_the_results(name):
    assert unproved(read(name)) == []


def test_a_number_without_a_file_is_found():
    said = "took 228 s on an AMD EPYC (`benchmarks/results/commands-cpu-2026-11-22.json`), or 229 s, and is 3.3x faster"
    assert unproved(said) == ["229 s", "3.3x"]


def test_pictures_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "docs" / "images").iterdir()) <= 700_000


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    own = ROOT / "build" / "docs-venv" / "bin" / "mkdocs"
    mkdocs = str(own) if own.exists() else shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("needs mkdocs: run make docs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
