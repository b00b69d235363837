"""Runs that die, or whose disk fails, at any operation on files: nothing is lost, nothing half, nothing left behind.

`make soak` tries every operation, `make test` a few of each command.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import file_faults as faults
import pytest
from wan_models import save_pipeline

from slagen.batch import worker
from slagen.cli.main import run
from slagen.io import files

pytestmark = pytest.mark.slow

SOAK = "SLAGEN_SOAK_FAULTS" in os.environ
SMALL = ["--size", "64x64", "--num-frames", "5", "--steps", "1", "--device", "cpu"]
TRAINING = {"steps": 2, "lr": 1e-3, "batch_size": 2, "micro_batch": 2, "proj_multiplier": 2.0}
DEFAULTS = {"steps": 1, "guidance_scale": 1.0, "max_sequence_length": 8, "fps": 8, "training": TRAINING,
            "width": 64, "height": 64, "num_frames": 5}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for seed in (0, 1):
        save_pipeline(folder / f"model{seed}", seed=seed)
        (folder / f"model{seed}" / "slagen.json").write_text(json.dumps(DEFAULTS))
    (folder / "prompts.txt").write_text("a red circle --seed 1\na circle --seed 2\n")
    (folder / "clips.txt").write_text("a red circle --num-videos 2\n")
    return folder


@dataclass(frozen=True)
class Command:
    """A command to be disturbed.

    Args:
        arguments: of it, {model} being the models' folder and {root} the folder that is watched.
        before: arguments of what lies there already, made without a disturbance.
        again: what is told besides when it is run again.
        folder: that is replaced as a whole: old or new, but for what a sweep puts right.
    """

    arguments: str
    before: str = ""
    again: str = ""
    folder: str = ""


GENERATE = "generate ?a+red+circle? --model {model}/model0 --attention dense --save-latents --output {root}/v.mp4"
FILE = "{model}/model0/transformer/diffusion_pytorch_model.safetensors"
OTHER = FILE.replace("model0", "model1")
COMMANDS = {
    "generate": Command(f"{GENERATE} --seed 1", again="--overwrite"),
    "generate-overwrite": Command(f"{GENERATE} --seed 1 --overwrite", before=f"{GENERATE} --seed 2"),
    "batch": Command(
        "batch {model}/prompts.txt --model {model}/model0 --attention dense --output {root}/out "
        "--cache-dir {root}/cache",
        again="--retry-failed",
    ),
    "convert": Command(f"convert {FILE} {{root}}/model --model {{model}}/model0", again="--overwrite", folder="model"),
    "convert-overwrite": Command(
        f"convert {OTHER} {{root}}/model --model {{model}}/model1 --overwrite",
        before=f"convert {FILE} {{root}}/model --model {{model}}/model0", folder="model",
    ),
    "merge": Command(
        f"merge {FILE} {{root}}/m.safetensors --diff-base {FILE} --diff-target {OTHER} --overwrite",
        before=f"merge {FILE} {{root}}/m.safetensors --diff-base {FILE} --diff-target {FILE}",
    ),
    "finetune": Command(
        f"finetune --model {{model}}/model0 --weights {OTHER} --from-dense --sparsity 0.6 --block-m 16 --block-n 16 "
        "--self-generate {model}/clips.txt --save-every 1 --validate-every 1000 --device cpu --output {root}/out",
    ),
}  # fmt: skip


def words_of(text: str, toy: Path, root: Path) -> list[str]:
    words = [word.strip("?").replace("+", " ") for word in text.format(model=toy, root=root).split()]
    return [*words, *(SMALL if words[0] in ("generate", "batch") else [])]


class Inline:
    """A thread pool that does everything at once, so that operations have the same numbers every time."""

    def __init__(self, **_): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, *arguments):
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Bench:
    """A command with its folder as it is before, and after it was left in peace."""

    command: Command
    toy: Path
    place: Path
    capsys: pytest.CaptureFixture

    def __post_init__(self):
        self.root = self.place / "root"
        self.start = self.place / "start"
        self.start.mkdir()
        for folder in ("tmp", "home"):
            (self.start / folder).mkdir()
        if self.command.before:
            self.reset(self.start)
            assert self.run(self.command.before) == 0
            shutil.rmtree(self.start)
            self.root.rename(self.start)
            if self.command.folder:
                (self.start / self.command.folder / "only-old.txt").write_text("old")
        self.reset(self.start)

    def reset(self, of: Path) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(of, self.root, symlinks=True)

    def run(self, text: str = "") -> int:
        code = run(words_of(text or self.command.arguments, self.toy, self.root))
        self.told = self.capsys.readouterr().err
        assert "a bug in slagen" not in self.told
        return code

    def check_again(self, what: str) -> None:
        """What a run that is left in peace makes of a folder is what it makes of a fresh one."""
        assert faults.half_files(self.root) == [], what
        for folder in (self.root, self.root / "tmp"):  # as the next run does that makes something there
            files.sweep(folder)
        if self.command.folder:
            found = faults.names(self.root / self.command.folder)
            assert found in (self.old, self.new) or (found == [] and not self.command.before), what
        if self.command.before and not self.command.folder:
            lost = set(faults.names(self.start)) - set(faults.names(self.root))
            if lost and lost <= {"v.json", "v.latents.safetensors"}:  # of a video that was replaced, as these were not
                assert self.kept(self.root)["v.mp4"] != self.kept(self.start)["v.mp4"], what
            else:
                assert not lost, what
        assert self.run(f"{self.command.arguments} {self.command.again}") == 0, (what, self.told)
        self.check_end(what)

    def check_end(self, what: str) -> None:
        assert faults.half_files(self.root) == [], what
        for file in self.root.rglob("*.latents.safetensors"):
            if str(file.relative_to(self.root)) not in self.end:
                file.unlink()  # what was kept, and told, where a video could not be written
        found, end = (
            {re.sub(r"data/[0-9a-f]{16}", "data/shard", name) for name in names if "cache/embeddings" not in name}
            for names in (faults.names(self.root), self.end)
        )  # what a cache did not take was kept in memory; which tensors share a shard is a matter of when
        assert found == end, what
        assert self.kept(self.root).items() <= self.weights.items(), what

    def kept(self, root: Path) -> dict[str, str]:
        """Hashes of videos and weights."""
        found = [path for path in sorted(root.rglob("*")) if path.suffix in (".mp4", ".safetensors")]
        found = [path for path in found if not {"checkpoints", "data"} & {*path.parts}]
        found = [path for path in found if not path.match("*.latents.safetensors")]  # in which times are
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    def undisturbed(self) -> list[tuple[str, Path]]:
        """Run in peace, which is what other runs are held against; returns how it would have been to die."""
        codes = []
        copies = self.place / "copies"
        copies.mkdir()
        found = faults.kills(lambda: codes.append(self.run()), self.root, copies)
        assert codes == [0], self.told
        self.end, self.weights = faults.names(self.root), self.kept(self.root)
        self.old, self.new = (faults.names(place / self.command.folder) for place in (self.start, self.root))
        assert not any(map(faults.is_temporary, map(Path, self.end)))
        return found


@pytest.fixture
def bench(request, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(worker, "POLL_S", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "root" / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "root" / "home"))
    monkeypatch.setattr("slagen.training.page.draw_chart", lambda chart: "<svg></svg>")  # matplotlib keeps files there
    return Bench(COMMANDS[request.param], toy, tmp_path, capsys)


def chosen(numbers: range, most: int) -> list[int]:
    """All of them in the soak, otherwise some from end to end."""
    if SOAK or len(numbers) <= most:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


class Soak:
    """What was tried of a test by this very code, so that a soak that is stopped goes on; and a line about it."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request, self.began, self.tried = request, time.monotonic(), 0
        sources = [*Path(files.__file__).parents[1].rglob("*.py"), Path(__file__), Path(faults.__file__)]
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
        self.key = f"slagen-soak/{request.node.name}"
        known = request.config.cache.get(self.key, {}) if SOAK else {}
        self.done = {"code": code, "names": known["names"] if known.get("code") == code else []}
        self.before = len(self.done["names"])

    def has(self, name: str) -> bool:
        return name in self.done["names"]

    def add(self, name: str) -> None:
        self.tried += 1
        if SOAK:
            self.done["names"].append(name)
            self.request.config.cache.set(self.key, self.done)

    def say(self, text: str) -> None:
        if SOAK:
            with self.request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                before = f" after {self.before} before" if self.before else ""
                seconds = time.monotonic() - self.began
                print(f"\n{self.request.node.name}: {text}, {self.tried} tried{before}, {seconds:.0f} s", flush=True)


KILLED = COMMANDS if SOAK else ("generate-overwrite", "batch", "convert-overwrite", "merge")
FAILING = COMMANDS if SOAK else ("generate-overwrite", "convert-overwrite", "merge")


@pytest.mark.parametrize("bench", KILLED, indirect=True)
def test_killed_at_an_operation(bench, request):
    """Before each, and with what it writes half written."""
    soak = Soak(request)
    found = bench.undisturbed()
    states: dict[str, tuple[str, Path]] = {}
    for what, place in found:
        assert faults.half_files(place) == [], what
        states.setdefault(faults.state(place), (what, place))
    for number in chosen(range(len(states)), 2):
        state, (what, place) = list(states.items())[number]
        if not soak.has(state):
            bench.reset(place)
            bench.check_again(what)
            soak.add(state)
    soak.say(f"{len(found)} kills, which leave the disk in {len(states)} states that a run goes on from")


@pytest.mark.parametrize("bench", FAILING, indirect=True)
def test_an_operation_fails(bench, request):
    """The disk is full from there on, or one operation meets a fault: it is told, and the next run mends it."""
    soak = Soak(request)
    count = sum(not what.startswith("half ") for what, _ in bench.undisturbed())
    seen: set[str] = set()
    for number in chosen(range(1, count + 1), 3):
        if soak.has(str(number)):
            continue
        fault = faults.FAULTS[number % 3]
        bench.reset(bench.start)
        code, reached = faults.failing(bench.run, bench.root, number, fault)
        what = f"operation {number} of {count}: {errno.errorcode[fault]}"
        assert code in (0, 1, 3) and reached, (what, code, bench.told)
        if (state := faults.state(bench.root)) not in seen:
            seen.add(state)
            bench.check_again(what)
        soak.add(str(number))
    soak.say(f"{count} operations, each failing once; the disk is in {len(seen)} states that a run goes on from")


# Two runs at once


def at_once(commands: list[str], toy: Path, root: Path) -> list[tuple[int, str]]:
    """Exit codes and messages of commands that begin at the same moment, each in a process of its own."""
    ready, go = os.pipe()
    children = []
    for number, command in enumerate(commands):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(go)
                sys.stdout = sys.stderr = os.fdopen(os.open(root / f"told{number}", os.O_WRONLY | os.O_CREAT), "w")
                os.read(ready, 1)  # until the parent closes the other end
                code = run(words_of(command, toy, root))
                sys.stderr.flush()
            finally:
                os._exit(code)
        children.append(pid)
    os.close(ready)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return [(code, (root / f"told{number}").read_text()) for number, code in enumerate(codes)]


TWICE = {
    "generate": f"{GENERATE} --seed {{number}}",
    "generate-overwrite": f"{GENERATE} --seed {{number}} --overwrite",
    "merge": COMMANDS["merge"].arguments + " --weight {number}",
    "convert": COMMANDS["convert-overwrite"].arguments,
}


@pytest.mark.parametrize("command", TWICE if SOAK else ("generate", "convert"))
def test_two_runs_on_one_output(toy, tmp_path, command):
    """Both ended with 0, with one video gone or beside the other's report; or both failed."""
    first, second = (TWICE[command].replace("{number}", str(number)) for number in (1, 2))
    for turn in range(20 if SOAK else 1):
        root = tmp_path / str(turn)
        root.mkdir()
        ended = at_once([first, second], toy, root)
        codes = sorted(code for code, _ in ended)
        assert codes in ([0, 1], [0, 2]) or (codes == [0, 0] and "overwrite" in first), ended
        for code, told in ended:
            assert code == 0 or "another slagen run is writing" in told or "exists" in told, told
        assert faults.half_files(root) == [] and not any(map(faults.is_temporary, root.rglob("*")))
        if "generate" in command:
            seed = json.loads((root / "v.json").read_text())["settings"]["seed"]
            assert ended[seed - 1][0] == 0, ended
