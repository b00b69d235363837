"""--config: options from a YAML file, under those of the command line, with the messages that the options have."""

from pathlib import Path

import pytest

from slagen.cli.main import run
from slagen.generation.config import GenerateConfig


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The configs that `generate` was asked for; the current folder is empty."""
    seen = []
    monkeypatch.setattr("slagen.generation.generate.generate", lambda wanted, on_event: seen.append(wanted))
    monkeypatch.setattr("slagen.cli.output.generate.show_videos", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    return seen


FILE = """\
prompt: a red circle   # every spelling of an option's name
num_frames: 9
num-inference-steps: 4
size: 64x32
sparsity: 0.5
sampler: dpm++
dense_steps: 0
seed: -1
smooth-keys: false
attention: sla2
ode: false
vae: null
"""
IN_FILE = {"num_frames": 9, "steps": 4, "width": 64, "height": 32, "sparsity": 0.5, "sampler": "dpm++",
           "dense_steps": "0", "attention": "sla2", "attention_options": (("smooth_keys", False),)}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("", {}),
        ("--steps 2 --smooth-keys", {"steps": 2, "attention_options": (("smooth_keys", True),)}),
        ("--width 32 --height 32 --num_frames=5", {"width": 32, "num_frames": 5}),
        ("--keep 0.2 -o x.mp4", {"sparsity": 0.8, "output": "x.mp4"}),
        ("word", {"prompt": "word"}),
        ("-p word --size 480p", {"prompt": "word", "width": 832, "height": 480}),
    ],
)  # fmt: skip
def test_the_command_line_wins(made, tmp_path, line, changed):
    (tmp_path / "f.yaml").write_text(FILE)
    assert run(["generate", *line.split(), "--config", "f.yaml"]) == 0
    assert made == [GenerateConfig(**{"prompt": "a red circle", **IN_FILE, **changed})]


def test_the_file_in_the_documents(made, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    (tmp_path / "options.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert run(["generate", "x", "--config", "options.yaml", "--sparsity", "0.9"]) == 0
    size = {"width": 128, "height": 128, "num_frames": 17}
    assert made == [GenerateConfig("x", model="tiny-wan", **size, sparsity=0.9, local_files_only=True)]


def test_the_file_wins_over_the_environment(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("slagen.batch.ray_workers.batch_on_ray", lambda config, *rest: seen.append(config) or 1 / 0)
    monkeypatch.setattr("slagen.batch.preflight.read_batch", lambda config: [])
    monkeypatch.setenv("RAY_ADDRESS", "environment:1")
    (tmp_path / "f.yaml").write_text("ray-address: file:2")
    run(["batch", "p.txt", "--ray", f"--config={tmp_path / 'f.yaml'}"])
    run(["batch", "p.txt", "--ray"])
    assert [config.ray_address for config in seen] == ["file:2", "environment:1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("num_frame: 9", "f.yaml: num_frame is not an option of slagen generate. Did you mean num_frames?"),
        ("hue: red", "f.yaml: hue is not an option of slagen generate. See slagen generate --help."),
        ("steps: many", "steps in f.yaml is 'many', but must be a whole number."),
        ("steps: 2.5", "steps in f.yaml is '2.5', but must be a whole number."),
        ("dtype: fp64", "dtype in f.yaml is 'fp64', but must be one of auto, bf16, fp16, fp32."),
        ("steps: true", "f.yaml: steps is True, but must be text or a number."),
        ("steps: [1, 2]", "f.yaml: steps is"),
        ("ode: 3", "f.yaml: ode is 3, but must be true or false."),
        ("num_frames: 10", "f.yaml: num_frames is 10, but must be a multiple of 4, plus 1."),
        ("{sparsity: 0.5, keep: 0.5}", "f.yaml: keep and sparsity are both given"),
        ("{steps: 4, num_steps: 5}", "f.yaml: steps and num_steps are the same option. Keep one of them."),
        ("i2v: 3", "f.yaml: i2v is not an option"),
        ("clip: a.pth", "f.yaml: clip is an option of other tools that slagen does not have: the image encoder"),
        ("- a", "f.yaml contains a list, but must contain options by name."),
        ("a: [", "f.yaml:2:1: it is not valid YAML"),
        ("config: f.yaml", "f.yaml: config is not an option"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_message(made, tmp_path, capsys, content, words):
    """As for an option, with the names of the file and the key, and the exit code of a wrong option."""
    (tmp_path / "f.yaml").write_text(content + "\n")
    assert run(["generate", "x", "--config", "f.yaml"]) == 2 and not made
    told = capsys.readouterr().err
    assert words in " ".join(told.split()) and told.count("error:") == 1


def test_a_file_that_is_not_there(made, capsys):
    assert run(["models", "--config", "f.yaml"]) == 2
    assert "f.yaml cannot be read (No such file or directory)" in " ".join(capsys.readouterr().err.split())
    assert run(["generate", "x", "--config"]) == 2 and "requires an argument" in capsys.readouterr().err
    assert run(["generate", "x", "--config", "a", "--config", "b"]) == 2 and not made
