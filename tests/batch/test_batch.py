"""Batches: every video once, whatever happens in between."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import start
from wan_models import save_pipeline

from slagen.batch.config import BatchConfig
from slagen.batch.forecast import RecordedTimes, describe_forecast
from slagen.batch.manifest import Manifest, Wanted
from slagen.batch.run import batch
from slagen.batch.worker import WorkerLoop
from slagen.cli.main import run
from slagen.errors import SlagenError, UsageError
from slagen.generation import session
from slagen.generation.config import GenerateConfig
from slagen.generation.replay import replay
from slagen.generation.resolve import make_plan
from slagen.video import read_mp4, write_video


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy")


def settings(toy, tmp_path, lines, output="out", **fields):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines))
    options = {name: fields.pop(name) for name in ("retry_failed", "shard", "no_cache") if name in fields}
    base = GenerateConfig(
        "-", model=str(toy), attention="dense", width=64, height=64, num_frames=5, steps=1, device="cpu",
        output=str(tmp_path / output), **fields,
    )  # fmt: skip
    return BatchConfig(str(path), base, cache_dir=str(tmp_path / "cache"), **options)


def made(folder):
    return sorted(path.name for path in Path(folder).glob("*.mp4"))


def events_of(config, **options):
    seen = []
    return batch(config, seen.append, **options), seen


def test_what_generate_warns_of_is_told_once_with_how_many_videos_it_is_about(toy, tmp_path):
    """A batch at a size the model was not trained at, or of words it does not know, said nothing."""
    model = Path(shutil.copytree(toy, tmp_path / "sized"))
    sizes = [dict(width=64, height=64, num_frames=9)]
    (model / "slagen.json").write_text(json.dumps({"trained_sizes": sizes, "vocabulary": ["a", "circle"],
                                                    "max_sequence_length": 8}))  # fmt: skip
    lines = ["a circle", "a circle", "a fox a a a a a a a circle --num-frames 9"]
    for again in (False, True):  # the second time its texts are known, and no text encoder is loaded
        _, seen = events_of(settings(model, tmp_path, lines, output=f"out{again}"))
        size, word, cut = (event.text for event in seen if event.kind == "warning")
        assert "has 11 tokens, but the model reads only the first 8" in cut
        assert "ignores everything from 'a a circle'" in cut
    assert "was trained only at 64x64 with 9 frames" in size and size.endswith("(2 videos)")
    assert "was not trained on 'fox'" in word


def test_a_second_run_makes_nothing_and_exits_0(toy, tmp_path):
    lines = [
        "a red circle --seed 1",
        "a circle",
        "a circle",
        "a red circle --seed 1",
        "a red circle --seed 2 --num-videos 2",
    ]
    first, seen = events_of(settings(toy, tmp_path, lines))
    assert len(first.made) == 5 and not first.failed
    assert any("appears twice with seed 1" in event.text for event in seen if event.kind == "warning")
    assert any("5 to generate; disk space: at most" in event.text for event in seen if event.kind == "plan")
    names = made(tmp_path / "out")
    assert names == sorted(first.made) and all(
        (tmp_path / "out" / name).with_suffix(".json").is_file() for name in names
    )
    assert not list((tmp_path / "out").glob("*.part"))
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names}
    again = batch(settings(toy, tmp_path, lines))
    assert not again.made and sorted(again.kept) == names
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names}


def test_the_page_shows_every_job_and_escapes_prompts(toy, tmp_path):
    """It is opened from disk: nothing in it is fetched. Prompts are words, never markup."""
    evil = '<script>alert("x")</script> circle'
    result = batch(settings(toy, tmp_path, ["a red circle --seed 1", evil + " --seed 2"]))
    page = result.page.read_text()
    assert page.count('<video src="data:video/mp4;base64,') == 2 and page.count("<figure") == 2
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert not re.search(r'(src|href)="(?!data:)[^"]*//', page)
    small = base64.b64decode(re.search(r'base64,([^"]+)"', page)[1])
    (tmp_path / "small.mp4").write_bytes(small)
    assert read_mp4(tmp_path / "small.mp4").shape == (5, 64, 64, 3)


def test_an_inserted_line_makes_one_video(toy, tmp_path):
    first = batch(settings(toy, tmp_path, ["a red circle", "a circle"]))
    second = batch(settings(toy, tmp_path, ["a circle --seed 5", "a red circle", "a circle", "a circle"]))
    assert sorted(second.kept) == sorted(first.made) and len(second.made) == 2


def test_what_is_gone_or_changed_is_made_again_under_its_name(toy, tmp_path):
    lines = ["a red circle", "a circle"]
    first = batch(settings(toy, tmp_path, lines))
    files = [tmp_path / "out" / name for name in first.made]
    hashes = [json.loads(file.with_suffix(".json").read_text())["latents_hash"] for file in files]
    files[0].unlink()
    files[1].write_bytes(b"not what it was")
    assert sorted(batch(settings(toy, tmp_path, lines)).made) == sorted(first.made)
    assert hashes == [json.loads(file.with_suffix(".json").read_text())["latents_hash"] for file in files]


def test_a_report_that_is_gone_is_made_again_of_what_its_video_says(toy, tmp_path):
    """Without the times, and without rendering anything: the video's own metadata hold the rest."""
    lines = ["a red circle --seed 1", "a circle --seed 2"]
    first = batch(settings(toy, tmp_path, lines))
    report, other = [(tmp_path / "out" / name).with_suffix(".json") for name in first.made]
    before, video = json.loads(report.read_text()), report.with_suffix(".mp4").read_bytes()
    report.unlink()
    other.write_text("[]")  # this one is not gone: it is left alone, and disturbs nobody
    second, seen = events_of(settings(toy, tmp_path, lines))
    assert second.kept == first.made and not second.made and report.with_suffix(".mp4").read_bytes() == video
    (told,) = (event.text for event in seen if event.kind == "note" and report.name in event.text)
    assert "restored from the video's metadata" in told and other.read_text() == "[]"
    after = json.loads(report.read_text())
    assert after["video"] == before["video"] and after["latents_hash"] == before["latents_hash"]
    assert after["settings"].items() <= before["settings"].items() and "restored" in after and "steps" not in after
    assert replay(str(report), model=str(toy)).same
    second, seen = events_of(settings(toy, tmp_path, lines, save_latents=True))
    assert not any(report.name in event.text for event in seen)
    (told,) = (event.text for event in seen if event.kind == "warning")  # it was silent
    assert second.kept == first.made and told.startswith(
        "2 complete videos have no saved latents and will not be generated again"
    )
    assert f"(the first: rm {tmp_path / 'out' / first.made[0]})" in told and "another folder with --output" in told


def test_a_time_that_no_machine_takes_is_no_measurement(toy, tmp_path):
    """A damaged cache with 1e299 in it made the forecast a line of 300 digits."""
    (task,) = jobs_of(toy, 64)
    times = RecordedTimes(tmp_path, ["x"])
    for seconds, told in ((1e299, None), (1e7, None), (20.0, 20.0)):
        times.store.write_text(json.dumps({times._key(task): [seconds]}))
        assert times.of([task]) == told


def test_a_report_that_cannot_be_made_again_is_told(toy, tmp_path):
    """Here the video is one without a word of itself, as another tool may have copied it."""
    config = settings(toy, tmp_path, ["a red circle --seed 1"])
    (name,) = batch(config).made
    path = tmp_path / "out" / name
    write_video(read_mp4(path), path, 8)
    manifest = Manifest(tmp_path / "out")
    (job,) = manifest.read().values()
    manifest.append({**job.result, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    path.with_suffix(".json").unlink()
    result, seen = events_of(config)
    (told,) = (event.text for event in seen if event.kind == "warning")
    assert result.kept == [name] and "delete" in told and "slagen did not generate it" in told


def test_one_failure_does_not_stop_the_rest(toy, tmp_path, monkeypatch):
    lines = ["a red circle --seed 1", "a circle --seed 2", "red --seed 3"]
    real = session.run_denoising

    def fail(pipe, plan, *rest):
        if plan.config.seed == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pipe, plan, *rest)

    monkeypatch.setattr(session, "run_denoising", fail)
    result = batch(settings(toy, tmp_path, lines))
    ((_, reason),) = result.failed
    assert len(result.made) == 2 and reason.startswith("the GPU ran out of memory in denoising at 64x64, 5 frames;")
    monkeypatch.setattr(session, "run_denoising", real)
    again = batch(settings(toy, tmp_path, lines))
    assert not again.made and "--retry-failed" in again.failed[0][1]
    third = batch(settings(toy, tmp_path, lines, retry_failed=True))
    assert len(third.made) == 1 and not third.failed


def test_shards_divide_the_work(toy, tmp_path):
    lines = [f"a circle --seed {seed}" for seed in range(5)]
    first = batch(settings(toy, tmp_path, lines, shard=(1, 2)))
    second = batch(settings(toy, tmp_path, lines, shard=(2, 2)))
    assert (len(first.made), len(second.made)) == (3, 2) and len(made(tmp_path / "out")) == 5
    with pytest.raises(UsageError, match="Try 1/2"):
        BatchConfig("x", GenerateConfig("-"), shard=(3, 2))


@pytest.mark.slow
def test_known_prompts_need_no_text_encoder(toy, tmp_path, monkeypatch):
    lines = ["a red circle --seed 4", "a circle --seed 5"]
    first = batch(settings(toy, tmp_path, lines))
    loaded = []
    real = session.load_pipeline

    def watch(*arguments, text_encoder, **more):
        loaded.append(text_encoder)
        return real(*arguments, text_encoder=text_encoder, **more)

    monkeypatch.setattr(session, "load_pipeline", watch)
    second = batch(settings(toy, tmp_path, lines, output="again"))
    assert loaded == [False]
    hashes = [
        json.loads((tmp_path / folder / name).with_suffix(".json").read_text())["latents_hash"]
        for folder, result in (("out", first), ("again", second)) for name in sorted(result.made)
    ]  # fmt: skip
    assert hashes[:2] == hashes[2:]
    for number, file in enumerate(sorted((tmp_path / "cache" / "embeddings").iterdir())):
        content = bytearray(file.read_bytes())
        content[-3] ^= 16  # whole, but not what was written
        file.write_bytes(content if number else b"damaged")
    third = batch(settings(toy, tmp_path, lines, output="third"))
    assert len(third.made) == 2 and loaded == [False, True]
    again = [json.loads((tmp_path / "third" / name).with_suffix(".json").read_text()) for name in sorted(third.made)]
    assert [report["latents_hash"] for report in again] == hashes[:2]
    batch(settings(toy, tmp_path, ["red --seed 1"], output="fourth", no_cache=True))
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 3  # two prompts and the empty negative one


def test_a_batch_makes_what_generate_makes(toy, tmp_path):
    from slagen.generation.generate import generate

    config = settings(toy, tmp_path, ["a red circle --seed 9"])
    name = batch(config).made[0]
    one = generate(GenerateConfig(**{**vars(config.generate), "prompt": "a red circle", "seed": 9,
                                     "output": str(tmp_path / "one.mp4")})).videos[0].report  # fmt: skip
    own = json.loads((tmp_path / "out" / name).with_suffix(".json").read_text())
    assert own["latents_hash"] == one["latents_hash"]
    assert set(own["stages_s"]) == {*one["stages_s"], "wait"} and own["stages_s"]["load"] == 0
    peaks = own["stage_memory"]  # a video is written while the next one is denoised
    assert peaks["peak_gib"]["write"] is None and peaks["unknown"] == "other videos are generated at the same time"


@pytest.mark.slow
def test_leftovers_of_the_dead_go_and_others_stay(toy, tmp_path):
    lines = ["a red circle --seed 1", "a circle --seed 2"]
    config = settings(toy, tmp_path, lines)
    first = batch(config)
    folder = tmp_path / "out"
    manifest = Manifest(folder)
    jobs = {job.name: job for job in manifest.read().values()}
    dead, live = (folder / f"{name}.part" for name in first.made)
    foreign = folder / "someone-elses.mp4.part"
    for path in (dead, live, foreign):
        path.write_bytes(b"half")
    lock = manifest.claim(jobs[first.made[1]])
    assert lock is not None
    # a lock is the process's own, so another process looks
    process = begin(toy, tmp_path, config.prompts, "other")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "other.err").read_text()
    assert not dead.exists() and live.exists() and foreign.exists()
    lock.release()


def test_planted_links_are_not_followed(toy, tmp_path):
    """In a folder that others may write to, a link of a name that is known beforehand emptied what it led to."""
    config = settings(toy, tmp_path, ["a circle --seed 1"])
    (name,) = batch(config).made
    out, victim = tmp_path / "out", tmp_path / "victim"
    shutil.rmtree(out)
    out.mkdir()
    victim.write_text("mine")
    stem = name.removesuffix(".mp4")
    for link in ("index.html", "index.html.part", f"{name}.part", f"{stem}.json.part", f"{stem}.json", name):
        (out / link).symlink_to(victim)
    assert batch(config).made == [name]
    assert victim.read_text() == "mine" and all((out / x).is_file() for x in ("index.html", name, f"{stem}.json"))
    assert not any((out / x).is_symlink() for x in ("index.html", name, f"{stem}.json"))
    (out / "manifest.jsonl").unlink()
    (out / "manifest.jsonl").symlink_to(victim)
    with pytest.raises(
        SlagenError,
        match="is a link, and slagen does not write through links",
    ):
        batch(config)
    assert victim.read_text() == "mine"
    shutil.rmtree(out / ".slagen")
    (out / ".slagen").symlink_to(tmp_path)
    with pytest.raises(SlagenError, match=".slagen is a symbolic link"):
        batch(config)


SOAK = "SLAGEN_SOAK_KILLS" in os.environ  # the long proof runs the bundled model


def command(toy, folder):
    model = ["--model", "tiny-wan"] if SOAK else ["--model", str(toy), "--attention", "dense"]
    return [*model, "--size", "64x64", "--num-frames", "5", "--steps", "1",
            "--device", "cpu", "--output", str(folder), "--cache-dir", str(Path(folder).parent / "cache")]  # fmt: skip


def begin(toy, tmp_path, prompts, name):
    """The command in a process of its own; what it says goes into the files `name` and `name`.err."""
    return start(run, [["batch", str(prompts), *command(toy, tmp_path / "out")]], tmp_path / name)


def check_consistent(folder, count):
    jobs = Manifest(folder).read()
    assert len(jobs) == count and {job.state for job in jobs.values()} == {"done"}
    assert made(folder) == sorted(job.name for job in jobs.values())
    assert all(Manifest(folder).is_whole(job) and len(read_mp4(folder / job.name)) == 5 for job in jobs.values())
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_killed_at_random_moments(toy, tmp_path):
    """`make soak` does this 25 times with 40 prompts."""
    prompts = tmp_path / "prompts.txt"
    count, kills = int(os.environ.get("SLAGEN_SOAK_PROMPTS", 4)), int(os.environ.get("SLAGEN_SOAK_KILLS", 1))
    prompts.write_text(
        "\n".join(["a red circle"] * (count // 2) + [f"a circle --seed {i}" for i in range(count - count // 2)])
    )
    rng = random.Random(count)
    for _ in range(kills):
        process = begin(toy, tmp_path, prompts, "killed")
        process.join(rng.uniform(0.5, 3.0))
        process.kill()
        process.join()
    process = begin(toy, tmp_path, prompts, "whole")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "whole.err").read_text()
    check_consistent(tmp_path / "out", count)


@pytest.mark.slow
def test_two_processes_make_each_video_once(toy, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a circle --seed {seed}" for seed in range(6)))
    both = [begin(toy, tmp_path, prompts, name) for name in ("one", "two")]
    for process, name in zip(both, ("one", "two"), strict=True):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / f"{name}.err").read_text()
    paths = [line for name in ("one", "two") for line in (tmp_path / name).read_text().splitlines()]
    assert len(paths) == len(set(paths)) == 6
    check_consistent(tmp_path / "out", 6)


def test_interrupted_once_the_video_is_finished(toy, tmp_path):
    """SIGINT in the first of three: that one is whole, the rest is for the next run, the code is 130."""
    config = settings(toy, tmp_path, [f"a circle --seed {seed}" for seed in range(3)])

    def interrupt(event):
        if event.kind == "job":
            os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    result = batch(config, interrupt)
    assert result.interrupted and len(result.made) == 1
    assert len(batch(config).made) == 2
    check_consistent(tmp_path / "out", 3)


def test_stopped_now_leaves_nothing_half(toy, tmp_path):
    config = settings(toy, tmp_path, ["a circle --seed 1", "a circle --seed 2"])

    def terminate(event):
        if event.kind == "stage" and event.text == "decode":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        batch(config, terminate)
    assert not list((tmp_path / "out").glob("*.part"))
    assert len(batch(config).made) == 2
    check_consistent(tmp_path / "out", 2)


# The manifest


def want(seed=None, **extra):
    return Wanted({"prompt": "p", **extra}, seed, "p")


def test_a_torn_line_is_passed_over_and_closed(tmp_path):
    manifest = Manifest(tmp_path)
    first, second = manifest.queue([want(1), want(2)])
    manifest.append({"event": "done", "key": first.key, "sha256": "x"})
    with manifest.path.open("ab") as handle:
        handle.write(b'{"v": 1, "event": "done", "key": "' + second.key[:20].encode())
    jobs = manifest.read()
    assert jobs[first.key].state == "done" and jobs[second.key].state == "queued"
    manifest.append({"event": "done", "key": second.key, "sha256": "y"})
    assert {job.state for job in manifest.read().values()} == {"done"}
    outside = {
        "v": 1,
        "event": "queued",
        "key": "k",
        "index": 3,
        "name": "../x.mp4",
        "settings": {},
        "seed": 1,
        "lookup": "",
    }
    for line in (json.dumps(outside).encode() + b"\n", b"null\n", b"[]\n", b'{"v": 9}\n', b"\xff\xfe\n"):
        with manifest.path.open("ab") as handle:
            handle.write(line)
    assert len(manifest.read()) == 2


def test_jobs_without_seeds_are_found_by_their_count(tmp_path):
    manifest = Manifest(tmp_path)
    first = manifest.queue([want(), want(), want(steps=3)])
    assert len({job.key for job in first}) == 3
    again = manifest.queue([want(7), want(steps=3), want(), want(), want()])
    assert [job.key for job in again[1:4]] == [first[2].key, first[0].key, first[1].key]
    assert [job.index for job in again] == [4, 3, 1, 2, 5]
    assert manifest.path.read_text().count("\n") == 5


def test_a_late_word_changes_nothing_that_is_done(tmp_path):
    manifest = Manifest(tmp_path)
    (job,) = manifest.queue([want(1)])
    manifest.append({"event": "done", "key": job.key, "sha256": "x"}, {"event": "running", "key": job.key})
    assert manifest.read()[job.key].state == "done"


def test_only_the_last_to_begin_ends_a_job(tmp_path):
    """Where locks do not hold, as on some network disks: who was overtaken does not count."""
    manifest = Manifest(tmp_path)
    (job,) = manifest.queue([want(1)])
    manifest.append({"event": "running", "key": job.key, "attempt": "a", "worker": "x"})
    Manifest(tmp_path).append({"event": "running", "key": job.key, "attempt": "b", "worker": "y"})
    assert not manifest.finish(job, "a", event="done", sha256="x")
    assert not manifest.finish(job, "a", event="failed", reason="late")
    assert manifest.read()[job.key].state == "running"
    assert manifest.finish(job, "b", event="done", sha256="y")
    assert Manifest(tmp_path).read()[job.key].result["sha256"] == "y"


def jobs_of(toy, *sizes, steps=1):
    """Tasks, as far as a forecast looks at them."""
    plans = [make_plan(GenerateConfig("-", model=str(toy), attention="dense", width=size, height=64, num_frames=5,
                                      steps=steps, device="cpu")) for size in sizes]  # fmt: skip
    return [SimpleNamespace(plan=plan, job=SimpleNamespace(key=str(i), result={})) for i, plan in enumerate(plans)]


def test_the_first_forecast_is_of_videos_like_these_or_none(toy, tmp_path):
    """It was by FLOPs of whatever had been made before: several times too long after small videos of few steps."""
    times = RecordedTimes(tmp_path, ["weights", "device"])
    small, large = jobs_of(toy, 64, 128)
    (longer,) = jobs_of(toy, 64, steps=16)
    assert "time" not in describe_forecast(tmp_path, [small], [small], times)
    for seconds in (30, 2, 3):
        times.add(small, seconds)
    assert "1 video, 1 to generate; estimated time: 3 s; disk" in describe_forecast(tmp_path, [small], [small], times)
    assert "2 videos, 2 to generate; estimated time: 6 s" in describe_forecast(
        tmp_path, [small] * 2, [small] * 2, times
    )
    for other in (large, longer):
        assert "time" not in describe_forecast(tmp_path, [small, other], [small, other], times)
    assert RecordedTimes(tmp_path, ["other weights", "device"]).of([small]) is None


def test_the_time_left_is_told_by_videos_after_the_first(toy, monkeypatch):
    """The first compiles kernels and reads files, and its time was taken for that of all the others."""
    tasks = jobs_of(toy, 64, 64, 64, 64)
    run_ = WorkerLoop(None, None, tasks, None, None, None, "", None)
    clock = iter([100.0, 200.0, 202.0, 204.0])
    monkeypatch.setattr("slagen.batch.worker.time.monotonic", lambda: next(clock))
    told = []
    for done in range(4):
        jobs = {task.job.key: SimpleNamespace(key=task.job.key, state="done" if i < done else "queued", result={})
                for i, task in enumerate(tasks)}  # fmt: skip
        told.append(run_._job_event(jobs, "p"))
    expected = ["0 of 4 done", "1 of 4 done", "2 of 4 done, about 4 s left", "3 of 4 done, about 2 s left"]
    assert [event.text for event in told] == [f"{text}: p" for text in expected]
    assert [event.left_s for event in told] == [None, None, 4.0, 2.0] and told[1].about == "video 2 of 4: 'p'"


def test_damaged_notes_in_the_cache_are_made_anew(toy, tmp_path):
    """hashes.json and times.json only save time."""
    config = settings(toy, tmp_path, ["a circle --seed 1"])
    first = batch(config)
    for text in ("", "[]", "{", '{"x": 3}', "null"):
        for name in ("hashes.json", "times.json"):
            (tmp_path / "cache" / name).write_text(text)
        assert batch(config).kept == first.made
    notes = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    (tmp_path / "cache" / "hashes.json").write_text(json.dumps({name: entry[:2] for name, entry in notes.items()}))
    assert batch(config).kept == first.made


def test_a_folder_that_takes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlagenError, match="is not writable"):
        Manifest(tmp_path / "file")
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(SlagenError, match="cannot be read"):
        Manifest(tmp_path).read()


def test_a_page_that_cannot_be_written_ends_no_batch(toy, tmp_path, monkeypatch):
    """All videos were made, and it ended with 1 and no result."""

    def on_a_full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slagen.batch.contact_sheet.write_text", on_a_full_disk)
    events = []
    result = batch(settings(toy, tmp_path, ["a red circle"]), events.append)
    assert len(result.made) == 1 and result.page is None
    (told,) = [event.text for event in events if event.kind == "warning" and "index.html" in event.text]
    assert "could not be written" in told and "No space left" in told


def test_command(toy, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --seed 3")
    assert run(["batch", str(prompts), *command(toy, tmp_path / "out")]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).is_file()
    assert run(["generate", "--prompts", str(prompts), *command(toy, tmp_path / "out")[:-2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == [Path(path).name]
    prompts.write_text("a --bad 3")
    assert run(["batch", str(prompts), *command(toy, tmp_path / "out")]) == 2
    assert "prompts.txt:1:3: --bad is unknown" in capsys.readouterr().err
    assert run(["batch", str(prompts), "--shard", "one"]) == 2
    assert run(["generate", "a", "--prompts", str(prompts)]) == 2
