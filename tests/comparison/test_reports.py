"""slagen compare A.json B.json: two reports beside each other, and what is no report."""

import json

import pytest
from wan_models import save_pipeline

from slagen.cli.main import run as command
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    model = str(save_pipeline(folder / "pipe"))
    paths = []
    for attention in ("dense", "mean"):
        config = GenerateConfig(
            "a red circle", model=model, width=64, height=64, num_frames=9, steps=2, seed=1, device="cpu",
            attention=attention, output=str(folder / f"{attention}.mp4"),
            **({"block_m": 16, "block_n": 16} if attention == "mean" else {}),
        )  # fmt: skip
        paths.append(generate(config).videos[0].report_path)
    return paths


def test_what_differs_and_where_the_time_went(reports, capsys):
    first, second = (json.loads(path.read_text()) for path in reports)
    assert command(["compare", *map(str, reports), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings_changed"]["attention"] == ["dense", "mean"] and "seed" not in found["settings_changed"]
    assert found["times_s"]["denoise"] == [first["stages_s"]["denoise"], second["stages_s"]["denoise"]]
    attention = sum(step["attention_ms"] for step in second["steps"]) / 1e3
    assert found["times_s"]["attention"][1] == pytest.approx(attention)
    assert found["same_latents"] is False and found["same_device"] is True
    assert command(["compare", *map(str, reports)]) == 0
    assert "dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda report: {**report, "schema_version": "x"}, 5, "schema_version"),
        (lambda report: {**report, "restored": "from"}, 5, "was restored from the metadata of a video"),
        (lambda report: {"kind": "comparison"}, 5, "is the JSON output of another command"),
        (lambda report: [], 5, "must be"),
    ],
)
def test_what_is_no_report(change, code, message, reports, tmp_path, capsys):
    (tmp_path / "b.json").write_text(json.dumps(change(json.loads(reports[0].read_text()))))
    assert command(["compare", str(reports[0]), str(tmp_path / "b.json")]) == code
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert command(["compare", str(reports[0]), str(tmp_path / "none.json")]) == 2
    assert command(["compare", str(reports[0])]) == 2 and "is a single report" in capsys.readouterr().err
