"""`slagen info` of a model's name."""

import json

from slagen.cli.main import run as slagen


def test_the_bundled_model_by_name(capsys):
    assert slagen(["info", "tiny-wan", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "pipeline"
    assert "128x128 with 17 frames" in about["trained_sizes"]
    assert {"circle", "red", "growing"} <= set(about["vocabulary"])
    assert all(word in about["vocabulary"] for word in about["example_prompt"].split())
    assert slagen(["info", "tiny-wan"]) == 0
    assert "circle, contracting, cyan" in " ".join(capsys.readouterr().out.split())


def test_a_folder_of_that_name_is_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-wan").mkdir()
    assert slagen(["info", "tiny-wan"]) == 5
    assert "tiny-wan" in capsys.readouterr().err


def test_a_preset_is_no_file(capsys):
    assert slagen(["info", "wan2.1-t2v-1.3b"]) == 2
    assert "See slagen models" in capsys.readouterr().err
