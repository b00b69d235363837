"""Golden copies of the JSON that scripts read: names of the fields and kinds of their values, never what they say.

Renewed with the other golden copies, as test_golden.py says.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from test_golden import compare
from wan_models import save_pipeline

from slagen.benchmark import run as bench
from slagen.cli.main import run
from slagen.cli.output.finetune import show_data
from slagen.doctor import checks as doctor
from slagen.kernels.costs import KernelCost
from slagen.training.data.dataset import Dataset
from slagen.wan.folder import bundled_folder

ANY_NAMES = {"versions", "versions_changed", "break_even_tokens", "even_tokens"}  # of packages, of shapes
VIDEO = ["--size", "64x64", "--num-frames", "9", "--steps", "1", "--device", "cpu"]


def form(value: Any, name: str = "") -> Any:
    """The names in a JSON value and the kinds of what they hold; of a list, what all its items have together."""
    if isinstance(value, dict):
        if name in ANY_NAMES:
            return "any names"
        return {key: form(item, key) for key, item in value.items()}
    if isinstance(value, list):
        found = [form(item) for item in value]
        if found and all(isinstance(item, dict) for item in found):
            names = dict.fromkeys(key for item in found for key in item)
            return [{key: alternatives([item[key] for item in found if key in item]) for key in names}]
        return [alternatives(found)] if found else []
    if value is None or isinstance(value, bool | str):
        return {None: "null", True: "bool", False: "bool"}.get(value, "text")
    return "number"


def alternatives(found: list[Any]) -> Any:
    """One form, or a list of "or" and several."""
    kinds = sorted({json.dumps(one) for one in found})
    return json.loads(kinds[0]) if len(kinds) == 1 else ["or", *map(json.loads, kinds)]


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """What a command prints with --json."""
    assert run([*words, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def lines(path: Path, kind: str) -> dict[str, Any]:
    """The form of the first line of each kind in a .jsonl file."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {f"{path.name}, {event[kind]}": form(event) for event in reversed(events)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    model = save_pipeline(tmp_path_factory.mktemp("golden") / "toy")
    training = {"steps": 1, "lr": 1e-3, "batch_size": 2, "micro_batch": 2, "proj_multiplier": 2.0}
    defaults = {"steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8, "fps": 8, "training": training,
                "width": 64, "height": 64, "num_frames": 9}  # fmt: skip
    (model / "slagen.json").write_text(json.dumps(defaults))
    return model


def test_json_of_a_video(toy, tmp_path, capsys):
    path, latents = tmp_path / "a.mp4", tmp_path / "a.latents.safetensors"
    options = [*VIDEO, "--size", "128x128", "--sparsity", "0.5", "--guidance-scale", "2", "--seed", "3"]
    options += ["--model", str(toy), "--allow-untrained", "--save-latents", "--output", str(path)]
    found = {
        "generate": answer(capsys, "generate", "a red circle", *options),
        "generate's file": json.loads(path.with_suffix(".json").read_text(encoding="utf-8")),
        "info of a video": answer(capsys, "info", str(path)),
        "info of a report": answer(capsys, "info", str(path.with_suffix(".json"))),
        "replay": answer(capsys, "replay", str(path), "--model", str(toy)),
        "replay of a report": answer(capsys, "replay", str(path.with_suffix(".json")), "--model", str(toy)),
        "decode": answer(capsys, "decode", str(latents), "-m", str(toy), "-o", str(tmp_path / "b.mp4")),
    }
    compare("json_video.json", {name: form(content) for name, content in found.items()})


def test_json_of_a_batch(toy, tmp_path, capsys):
    options = [*VIDEO, "--model", str(toy), "--attention", "dense", "--cache-dir", str(tmp_path / "cache")]
    options += ["--output", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a red circle --seed 1\n")
    found = {"batch": form(answer(capsys, "batch", str(tmp_path / "prompts.txt"), *options))}
    compare("json_batch.json", {**found, **lines(tmp_path / "out" / "manifest.jsonl", "event")})


@pytest.mark.slow
def test_json_of_a_training(toy, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle --steps 1 --num-videos 2\n")
    options = ["--model", str(toy), "--from-dense", "--sparsity", "0.6", "--block-m", "16", "--block-n", "16"]
    options += ["--self-generate", str(tmp_path / "prompts.txt"), "--device", "cpu", "--validate-every", "1000"]
    found = {"finetune": form(answer(capsys, "finetune", *options, "--output", str(tmp_path / "out")))}
    found["info of its weights"] = form(answer(capsys, "info", str(tmp_path / "out" / "sla.safetensors")))
    show_data(Dataset(tmp_path / "out" / "data"), True)
    found["finetune data"] = form(json.loads(capsys.readouterr().out))
    compare("json_finetune.json", {**found, **lines(tmp_path / "out" / "log.jsonl", "event")})


def test_json_of_the_rest(toy, tmp_path, capsys, monkeypatch):
    options = ["--shape", "1x1x128x16", "--method", "sla", "--method", "sdpa", "--sparsity", "0.5", "--length", "64"]
    options += ["--seconds", "0.01", "--device", "cpu", "--backward", "--output", str(tmp_path / "bench")]
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, dtype: (1.0, 1.0))  # slow
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("torch", "ok", "2.0")])
    found = {
        "plan": answer(capsys, "plan"),
        "plan of a preset": answer(capsys, "plan", "--model", "turbowan2.1-t2v-1.3b-480p", "--seed", "1"),
        "generate --dry-run": answer(capsys, "generate", "x", "--dry-run", "--device", "cpu", "--attention", "dense"),
        "models": answer(capsys, "models"),
        "info of a pipeline": answer(capsys, "info", str(toy)),
        "info of a pipeline with SLA": answer(capsys, "info", str(bundled_folder())),
        "info of SLA weights": answer(capsys, "info", str(bundled_folder() / "sla.safetensors")),
        "info of a transformer": answer(capsys, "info", str(toy / "transformer")),
        "bench": answer(capsys, "bench", *options),
        "doctor": answer(capsys, "doctor"),
    }
    compare("json_rest.json", {name: form(content) for name, content in found.items()})


def test_json_of_a_kernel():
    row = KernelCost("attend", "sm_90", 128, "bf16", "", {"tile_m": 64}, 1, 2, 3, 0, "wgmma", True, 4, 5, 6, 7, 8, [])
    compare("json_kernels.json", {"doctor --kernels, a row": form(row.to_dict())})


def test_forms():
    value = {"a": 1, "b": [{"c": None}, {"c": 2.5, "d": True}], "e": [], "versions": {"x": "1"}, "f": ["x", None]}
    assert form(value) == {
        "a": "number", "b": [{"c": ["or", "null", "number"], "d": "bool"}], "e": [],
        "versions": "any names", "f": [["or", "null", "text"]],
    }  # fmt: skip
