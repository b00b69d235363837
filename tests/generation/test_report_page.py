"""The page of a report: what it shows is what the report says, it needs nothing else, and what is no report."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from wan_models import save_pipeline

from slagen.cli.main import run as command
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.pages import write_page
from slagen.generation.report_page import EMBEDDED, Shown, report_page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    model = str(save_pipeline(folder / "pipe"))
    videos = []
    for attention in ("dense", "mean"):
        config = GenerateConfig(
            "a red <b>circle</b> & {{ 7 * 7 }}", model=model, width=64, height=64, num_frames=9, steps=3, seed=1,
            device="cpu", attention=attention, output=str(folder / f"{attention}.mp4"), report=True,
            **({"block_m": 16, "block_n": 16} if attention == "mean" else {}),
        )  # fmt: skip
        videos.append(generate(config).videos[0])
    return videos


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_generate_writes_the_page_beside_its_video(made):
    page = made[1].path.with_suffix(".html").read_text()
    found = Elements(page)
    assert "a red <b>circle</b> & {{ 7 * 7 }}" in found.text and not any(tag == "b" for tag, _ in found.found)
    (video,) = (attributes for tag, attributes in found.found if tag == "video")
    assert video["src"].startswith("data:video/mp4;base64,")
    record = made[1].record
    bars = [attributes for tag, attributes in found.found if tag == "rect" and "fill-opacity" not in attributes]
    cells = [attributes for tag, attributes in found.found if tag == "rect" and "fill-opacity" in attributes]
    assert len(bars) == 3 * 3 and len(cells) == 3 * 2  # three parts of three steps; two layers
    assert max(float(cell["fill-opacity"]) for cell in cells) == 1
    for step in record.steps:
        assert len(step.layers_ms) == 2 and sum(step.layers_ms) == pytest.approx(step.attention_ms)
        assert f"{step.latency_ms:.1f}" in found.text
    assert f"{record.cost.flops_speedup:.2f} times as many FLOPs" in found.text.replace("\n", " ")
    assert f"slagen replay {made[1].report_path.name}" in found.text
    assert made[1].record.latents_hash in found.text


def test_the_page_of_a_video_that_is_replaced_goes_and_no_other(made, tmp_path):
    config = GenerateConfig(
        "a", model=str(made[0].path.parent / "pipe"), width=64, height=64, num_frames=9, steps=1, seed=1, device="cpu",
        attention="dense", output=str(tmp_path / "a.mp4"), report=True,
    )  # fmt: skip
    page = generate(config).videos[0].path.with_suffix(".html")
    assert page.exists()
    generate(dataclasses.replace(config, seed=2, report=False, overwrite=True))
    assert not page.exists()
    page.write_text("<html>mine</html>")
    generate(dataclasses.replace(config, seed=3, report=False, overwrite=True))
    assert page.read_text() == "<html>mine</html>"


def test_a_page_asks_the_network_for_nothing(made):
    page = report_page([Shown(video.report_path.name, video.record, video.path.read_bytes()) for video in made])
    links = [value for _, attributes in Elements(page).found for name, value in attributes.items()
             if name in ("src", "href", "data", "action", "srcset")]  # fmt: skip
    assert links and all(link.startswith("data:") for link in links)
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page


def test_several_reports_stand_beside_each_other_with_ratios(made):
    dense, mean = (video.record for video in made)
    page = Elements(report_page([Shown("a.json", dense, None), Shown("b.json", mean, None)]))
    ratio = dense.stages_s["denoise"] / mean.stages_s["denoise"]
    assert f"{mean.stages_s['denoise']:.2f} ({ratio:.2f}x)" in page.text
    attention = [sum(step.attention_ms for step in record.steps) / 1e3 for record in (dense, mean)]
    assert f"{attention[1]:.2f} ({attention[0] / attention[1]:.2f}x)" in page.text
    assert page.text.count("Computed, not measured") == 1  # dense attention has saved nothing
    assert [tag for tag, _ in page.found].count("video") == 0 and "not beside its report" in page.text


def test_a_large_video_is_linked_and_an_untimed_run_has_no_charts(made):
    untimed = dataclasses.replace(made[0].record, steps=[
        dataclasses.replace(step, latency_ms=None, attention_ms=None, attention_conditional_ms=None,
                            attention_unconditional_ms=None, attention_share=None, layers_ms=None)
        for step in made[0].record.steps
    ])  # fmt: skip
    page = Elements(report_page([Shown("a.json", untimed, bytes(EMBEDDED + 1))]))
    assert [attributes["href"] for tag, attributes in page.found if tag == "a"] == ["./dense.mp4"]
    assert not any(tag == "svg" for tag, _ in page.found)


def test_command(made, tmp_path, capsys):
    pages = tmp_path / "both.html"
    line = ["report", str(made[0].report_path), str(made[1].path), "--output", str(pages)]
    assert command(line) == 0 and capsys.readouterr().out.strip() == str(pages)
    first = pages.read_text()
    assert command(line) == 2 and "exists" in capsys.readouterr().err and pages.read_text() == first
    assert command([*line, "--overwrite"]) == 0
    report = json.loads(made[0].report_path.read_text())
    old = {**report, "steps": [{k: v for k, v in step.items() if k != "layers_ms"} for step in report["steps"]]}
    (tmp_path / "old.json").write_text(json.dumps(old))  # a report of an earlier version
    assert write_page([str(tmp_path / "old.json")], None, False) == tmp_path / "old.html"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ('{"kind": "comparison"}', 5, "is the JSON output of another command"),
        ('{"restored": "from"}', 5, "was restored from the metadata of a video"),
        ("{}", 5, "has no"),
        ("no", 5, "is not valid JSON"),
        (None, 2, "does not exist"),
    ],
)
def test_what_is_no_report(content, code, message, tmp_path, capsys):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    assert command(["report", str(file)]) == code
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not file.with_suffix(".html").exists()
    assert command(["report", str(file), "-o", "page.txt"]) == 2
