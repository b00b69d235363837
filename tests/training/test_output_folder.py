"""The output folder of a training: one run at a time, nothing of others overwritten or deleted."""

import dataclasses

import pytest
from finetune_runs import settings

from slagen.errors import SlagenError, UsageError
from slagen.generation.config import GenerateConfig
from slagen.io.locks import locked_folder
from slagen.training import output_folder
from slagen.training.config import DataConfig
from slagen.training.data.prepare import prepare
from slagen.training.finetune import finetune

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


def test_what_is_refused_leaves_no_folder(tmp_path):
    """A folder with nothing but .lock stayed, of data that were refused."""
    (tmp_path / "nothing").mkdir()
    data, base = DataConfig(str(tmp_path / "nothing")), GenerateConfig("-", model="tiny-wan", device="cpu")
    with pytest.raises(UsageError):
        prepare(data, base, tmp_path / "new" / "prep", tmp_path / "cache", 0, lambda event: None)
    assert not (tmp_path / "new").exists()


def test_only_an_empty_folder_that_was_not_there_is_deleted(tmp_path):
    (tmp_path / "old").mkdir()
    for folder, file in ((tmp_path / "old", None), (tmp_path / "new", "kept")):
        with pytest.raises(KeyboardInterrupt), locked_folder(folder):
            if file:
                (folder / file).touch()
            raise KeyboardInterrupt
        assert folder.is_dir()
        with locked_folder(folder):  # its lock is free again
            pass


def test_files_of_others_are_not_written_over(toy, tmp_path):
    model, data = toy
    for name in ("sla.safetensors", "transformer.safetensors", "transformer"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / name).write_text("mine")
        for restart in (False, True):
            with pytest.raises(UsageError, match="exists and was not written by slagen finetune"):
                finetune(settings(model, folder, data=data, steps=1, restart=restart))
        assert (folder / name).read_text() == "mine"


def test_other_weights_under_the_same_name_are_refused(toy, tmp_path):
    model, data = toy
    first = finetune(settings(model, tmp_path / "first", data=data, steps=2))
    again = {"from_dense": False, "data": data, "weights": str(first.weights)}
    for output, fields in ((tmp_path / "first", again), (model, {"data": data})):
        with pytest.raises(UsageError, match="where the result would overwrite them"):
            finetune(settings(model, output, **fields, steps=3))
    assert not (model / ".lock").exists()
    again["weights"] = str(tmp_path / "first")  # the folder: only the file in it counts
    config = settings(model, tmp_path / "second", **again, steps=2)
    finetune(config)
    (tmp_path / "first" / "notes.txt").write_text("new")
    finetune(config)
    finetune(settings(model, tmp_path / "first", data=data, steps=4, restart=True))
    with pytest.raises(UsageError, match="weights_hash was .* Give the same settings"):
        finetune(config)


def test_restart_takes_away_its_own_and_not_before_all_is_well(toy, tmp_path):
    model, data = toy
    config = settings(model, tmp_path / "out", data=data, steps=2, restart=True)
    foreign = [tmp_path / "out" / name for name in ("checkpoints/my-model.pt", "clips/holiday.mp4", "notes.txt")]
    finetune(dataclasses.replace(config, seed=1))
    for file in foreign:
        file.write_text("mine")
    left = [tmp_path / "out" / name for name in ("checkpoints/step-000077", "tensorboard", "clips/step-000009-0.mp4")]
    for path in left:
        path.mkdir() if path.suffix == "" else path.write_text("old")
    kept = tmp_path / "out" / "checkpoints" / "step-000002-keep"
    kept.mkdir()
    own = (tmp_path / "out" / "checkpoints").glob("step-00000?")
    before = {path.name: (path / "sha256.json").read_text() for path in own}
    with pytest.raises(UsageError):
        finetune(dataclasses.replace(config, data=DataConfig(str(tmp_path / "nowhere"))))
    assert before == {name: (tmp_path / "out" / "checkpoints" / name / "sha256.json").read_text() for name in before}
    assert finetune(config).steps == 2
    assert all(file.read_text() == "mine" for file in foreign) and kept.is_dir()
    assert not any(path.exists() for path in left)


def test_a_disk_too_small_is_told_before_the_first_step(toy, tmp_path, monkeypatch):
    model, data = toy
    usage = output_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    with pytest.raises(SlagenError, match="has 9.3e-05 GiB free, but needs space for 3 checkpoints of 0.00.* GiB each"):
        finetune(settings(model, tmp_path / "out", data=data))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_runs_in_one_folder(toy, tmp_path):
    model, data = toy
    with output_folder.hold_folder(tmp_path / "out"), pytest.raises(SlagenError, match="is writing to"):
        finetune(settings(model, tmp_path / "out", data=data))
    (tmp_path / "file").write_text("")
    with pytest.raises(SlagenError, match="is not writable") as caught:
        finetune(settings(model, tmp_path / "file", data=data))
    assert caught.value.exit_code == 1
