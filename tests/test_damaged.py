"""Damaged prompt, weight, report, manifest and config files: each is read, or refused in one message, at once.

`make soak` tries 2,000 of them, each within 5 s of processor time and 1 GiB of memory; `make test` a sample.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs
from damaged_files import damaged
from safetensors.torch import save_file
from wan_models import save_pipeline

from slagen.attention.sla.config import SLAConfig
from slagen.batch.contact_sheet import write_page
from slagen.batch.forecast import RecordedTimes
from slagen.batch.manifest import Manifest, Wanted
from slagen.cli.main import run
from slagen.errors import GateError, SlagenError, UsageError, WeightsError
from slagen.formats.sla import read_sla
from slagen.generation import provenance as told
from slagen.generation.embeddings import content_hashes
from slagen.generation.prompts import read_prompts
from slagen.generation.report import comment
from slagen.generation.video_report import UsedWeights
from slagen.training.checkpoints import HASHES, read_latest
from slagen.training.data.dataset import Dataset
from slagen.training.data.store import INDEX_FILE, SET_FILE, Store
from slagen.training.data.videos import find_videos
from slagen.training.log import StepRecord, ValidationRecord, read_log, validated
from slagen.video import write_video
from slagen.wan.folder import bundled_folder, describe_folder
from slagen.wan.loading import load_pipeline

gguf = needs("gguf", "slagen[gguf]")
COUNT = int(os.environ.get("SLAGEN_SOAK_DAMAGED", 0))  # of the long proof
SECONDS, BYTES = 5, 2**30


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file that is damaged, and what reads it.

    Args:
        share: of 100 damaged files, those that are of this kind.
        kind: of damage. path: where the whole file lies, and then the damaged one.
        read: it may raise SlagenError.
    """

    share: float
    kind: str
    path: Path
    read: Callable[[], object]


def command(*words: object) -> Callable[[], None]:
    """A command that ends well, or raises SlagenError where it says that its input is wrong or broken; never a bug."""

    def call() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = run([str(word) for word in words])
        assert code in (0, UsageError.exit_code, WeightsError.exit_code, GateError.exit_code), said.getvalue()
        if code in (UsageError.exit_code, WeightsError.exit_code):
            raise WeightsError(said.getvalue())

    return call


class Hang(BaseException):
    """More than a reader may take."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In the long proof: no more processor time and memory than a small file may cost."""
    if not COUNT:
        yield
        return

    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, handler)


PROMPTS = {
    ".txt": "a red circle --seed 3 --size 64x64\nb --id x --steps 4 --num-videos 2\n# c\n",
    ".jsonl": '{"prompt": "a", "seed": 3, "size": "64x64"}\n{"prompt": "b", "id": "x", "steps": 4}\n"c"\n',
    ".csv": 'prompt,seed,id\n"a, b",3,\nc,,x\n',
    ".yaml": "base: &b {steps: 4}\nprompts:\n- prompt: a\n  seed: 3\n- {<<: *b, prompt: b, id: x}\n- c\n",
}
CONFIGS = (
    "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json", "slagen.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    """Every reader by name, with a whole file each."""
    folder = tmp_path_factory.mktemp("damaged")
    made: dict[str, Reader] = {}
    for suffix, text in PROMPTS.items():
        path = folder / f"prompts{suffix}"
        path.write_text(text.removeprefix("base: &b {steps: 4}\nprompts:\n").replace("<<: *b, ", "steps: 4, "))
        kind = "lines" if suffix == ".jsonl" else "text"
        made[f"prompts{suffix}"] = Reader(5, kind, path, lambda path=path: read_prompts(str(path)))
    made |= model_readers(folder) | weight_readers(folder) | batch_readers(folder) | training_readers(folder)
    return made


def model_readers(folder: Path) -> dict[str, Reader]:
    model = save_pipeline(folder / "model")
    shutil.copy(bundled_folder() / "slagen.json", model)

    def load() -> None:
        load_pipeline(describe_folder(model, "x"), torch.float32)

    return {name: Reader(4, "json", model / name, load) for name in CONFIGS}


def weight_readers(folder: Path) -> dict[str, Reader]:
    transformer = folder / "model/transformer/diffusion_pytorch_model.safetensors"
    plain, pickle, side = folder / "a.safetensors", folder / "a.pth", folder / "sla.safetensors"
    tensors = {f"blocks.{i}.attn1.{name}.weight": torch.ones(4, 4) for i in range(2) for name in ("to_q", "to_k")}
    shutil.copy(transformer, plain)
    torch.save(tensors, pickle)
    fields = {"config": SLAConfig().to_dict(), "base_model": "x", "base_hash": "y", "trained": "all", "steps": 1,
              "sampler_family": "flow", "source_hash": "", "format_version": 1}  # fmt: skip
    projection = {f"blocks.0.attn1.processor.proj_l.{name}": torch.ones(4) for name in ("weight", "bias")}
    save_file(projection, side, metadata={"slagen": json.dumps(fields)})
    quantised = folder / "a.gguf"
    writer = gguf.GGUFWriter(quantised, "wan")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sharded = folder / "sharded"
    sharded.mkdir()
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    shard = "one-00001-of-00001.safetensors"
    shutil.copy(transformer, sharded / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(fields))

    def read_metadata() -> None:
        text = metadata.read_bytes().decode("utf-8", "replace")
        save_file(projection, folder / "tampered.safetensors", metadata={"slagen": text})
        read_sla(folder / "tampered.safetensors")

    return {
        "safetensors": Reader(7, "safetensors", plain, command("info", plain)),
        "sla": Reader(5, "safetensors", side, command("info", side)),
        "pickle": Reader(3, "binary", pickle, command("info", pickle)),
        "gguf": Reader(3, "binary", quantised, command("info", quantised)),
        "shards": Reader(4, "json", index, command("info", sharded)),
        "metadata of sla": Reader(4, "json", metadata, read_metadata),
    }


def batch_readers(folder: Path) -> dict[str, Reader]:
    out, other, cache = folder / "out", folder / "other", folder / "cache"
    manifest = Manifest(out)
    settings = {"prompt": "a red circle", "size": "16x16", "num_frames": 5, "fps": 8, "seed": 1, "attention": "sla",
                "sparsity": 0.5, "steps": 2, "guidance_scale": 1.0, "negative_prompt": "", "model": None}  # fmt: skip
    (job,) = manifest.queue([Wanted(settings, 1, "a")])
    weights = UsedWeights(model="m", model_hash="m" * 64, used="base")
    video, text = out / job.name, comment(settings, "l" * 64, "f" * 64, weights)
    write_video(np.zeros((5, 16, 16, 3), np.uint8), video, 8, text)
    end = {"event": "done", "key": job.key, "sha256": "a" * 64, "latents_hash": "l" * 64, "seconds": 1.0}
    manifest.append({"event": "running", "key": job.key, "attempt": "x", "worker": "y:z:1"}, {**end, "attempt": "x"})
    shutil.copytree(out, other)
    report = video.with_suffix(".json")
    content = {**json.loads(text), "cost": {"measured_attention_share": 0.5}, "steps": [{"step": 1}]}
    content["video"]["sha256"] = "a" * 64
    report.write_text(json.dumps(content))

    def read_manifest() -> None:
        around, found = sorted(folder.iterdir()), Manifest(other)
        jobs = found.queue([Wanted({"prompt": "b"}, 2, "b"), Wanted({"prompt": "c"}, None, "c")])
        assert {job.key for job in jobs} <= found.read().keys()
        write_page(found)
        assert sorted(folder.iterdir()) == around

    clip, words = folder / "clip.mp4", folder / "comment.json"
    shutil.copy(video, clip)
    words.write_text(text)

    again = Path(shutil.copy(report, folder / "replay.json"))

    def make_again() -> None:
        made = SimpleNamespace(videos=[SimpleNamespace(record=told.Made(report, "report", content))])
        with pytest.MonkeyPatch.context() as patch:  # nothing is rendered
            patch.setattr("slagen.generation.replay.generate", lambda config, on_event: made)
            command("replay", again)()

    def read_words() -> None:
        said = words.read_bytes().decode("utf-8", "replace")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(told, "read_comment", lambda path: said)
            command("info", clip)()
            told.restored_report(clip, settings, end)

    cache.mkdir()
    content_hashes([clip], cache)
    (cache / "times.json").write_text('{"x": [0.5]}')
    return {
        "report": Reader(5, "json", report, command("info", report)),
        "report to replay": Reader(2, "json", again, make_again),
        "report on the page": Reader(3, "json", report, lambda: write_page(Manifest(out))),
        "manifest": Reader(10, "lines", other / "manifest.jsonl", read_manifest),
        "video": Reader(2, "binary", clip, command("info", clip)),
        "words of a video": Reader(4, "json", words, read_words),
        "hashes": Reader(1, "json", cache / "hashes.json", lambda: content_hashes([clip], cache)),
        "times": Reader(1, "json", cache / "times.json", lambda: RecordedTimes(cache, ["x"]).of([])),
    }


def training_readers(folder: Path) -> dict[str, Reader]:
    run_, data, raw = folder / "run", folder / "data", folder / "raw"
    state = run_ / "checkpoints/step-000002"
    state.mkdir(parents=True)
    save_file({"weights/x": torch.ones(1)}, state / "state.safetensors")
    (state / "state.json").write_text(json.dumps({
        "step": 2, "seconds": 1.0, "settings": {"data_options": {}}, "before": {"error": 0.5, "layers": [0.1]},
        "plain": {"x": {"step": 2.0}},
    }))  # fmt: skip
    step = StepRecord(1, 2, 0.5, None, 1.0, 1e-5, [0.1, 0.2], 1e3, 0.0, 1.0, 1.0).to_dict()
    validation = ValidationRecord(2, 0.4, ["step-000002-0.mp4"]).to_dict()
    (run_ / "log.jsonl").write_text("\n".join(map(json.dumps, (step, validation))) + "\n")

    def read_state() -> None:
        files = {name: (state / name).read_bytes() for name in ("state.json", "state.safetensors")}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        (state / HASHES).write_text(json.dumps(hashes))
        read_latest(run_)

    store = Store(data)
    names = [character * 64 for character in "abcd"]
    for name in names:
        store.add(name, torch.ones(4, 2, 2, 2), "x")
    store.flush()
    clips = [{"latents": a, "text": "d" * 64, "caption": "x", "shape": [4, 2, 2, 2], "held_out": a[0] == "b"}
             for a in names[:2]]  # fmt: skip
    about = {"version": 1, "identity": "i", "model": "m", "negative": "c" * 64, "negative_prompt": "", "fps": 8,
             "clips": clips}  # fmt: skip
    (data / SET_FILE).write_text(json.dumps(about))
    raw.mkdir()
    (raw / "a.mp4").write_bytes(b"")
    lists = {
        "data.jsonl": '{"video_path": "a.mp4", "caption": "x"}\n{"video_path": "a.mp4", "caption": "y"}\n',
        "videos2caption.json": '[{"path": "a.mp4", "cap": ["x"]}]',
        "metadata.csv": "video,prompt\na.mp4,x\n",
    }
    for name, text in lists.items():
        (raw / name).write_text(text)
    (raw / "sub").mkdir()
    (raw / "sub" / "a.mp4").write_bytes(b"")
    (raw / "sub" / "a.txt").write_text("a red circle\n")
    made = {name: Reader(1, "lines" if name[-1] == "l" else "json" if name[-1] == "n" else "text", raw / name,
                         lambda name=name: find_videos(raw / name)) for name in lists}  # fmt: skip
    return {
        **made,
        "caption": Reader(0.5, "text", raw / "sub/a.txt", lambda: find_videos(raw / "sub")),
        "log": Reader(1.5, "lines", run_ / "log.jsonl", lambda: (read_log(run_), validated(run_))),
        "state": Reader(1.5, "json", state / "state.json", read_state),
        "data set": Reader(1.5, "json", data / SET_FILE, lambda: Dataset(data)),
        "index of a data set": Reader(1, "lines", data / INDEX_FILE, lambda: Dataset(data)),
    }


NAMES = (
    *(f"prompts{suffix}" for suffix in PROMPTS), *CONFIGS, "safetensors", "sla", "pickle", "gguf", "shards",
    "metadata of sla", "report", "report to replay", "report on the page", "manifest", "video", "words of a video",
    "hashes", "times", "data.jsonl", "videos2caption.json", "metadata.csv", "caption", "log", "state", "data set",
    "index of a data set",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused(readers, name, record_property):
    """246 exceptions at 52 places became "a bug in slagen"; some of them hung, or took all memory."""
    reader = readers[name]
    whole = reader.path.read_bytes()
    reader.read()  # while it is whole
    shares = sum(each.share for each in readers.values())
    refused = count = math.ceil(COUNT * reader.share / shares) if COUNT else 3
    try:
        for number in range(count):
            seed = f"{name}-{number}"
            reader.path.write_bytes(damaged(reader.kind, whole, seed))
            try:
                with bounded():
                    reader.read()
                refused -= 1
            except SlagenError as error:
                assert error.exit_code in (2, 5), seed
                assert len(str(error)) < 20_000, seed
            except (Exception, Hang) as error:
                raise AssertionError(f"{seed}: {type(error).__name__}: {error}"[:500]) from error
    finally:
        reader.path.write_bytes(whole)
    record_property("damaged", count)
    print(f"{name}: {count} damaged files, {refused} of them refused")
