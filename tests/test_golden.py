"""Golden copies: what must stay as it is while the code is rearranged.

They lie in tests/golden/. After a change on purpose write them anew, and look at what `git diff` says of it:

    SLAGEN_GOLDEN=renew python -m pytest -n 0 tests/test_golden.py tests/test_golden_json.py

An entry that no change may alter is not written anew: the key of a job in a batch, the tensors of the bundled weights,
what a command line means. Where only a name inside of the code changed, delete the golden file first, and compare.
tests/golden_latents.py does the same by hand for latents and tuned weights, which every machine rounds otherwise.
"""

import dataclasses
import inspect
import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

from slagen.attention import registry
from slagen.attention.sla.config import SLAConfig
from slagen.batch import manifest, ray_workers
from slagen.batch import preflight as batch_preflight
from slagen.batch import run as batch
from slagen.batch.config import BatchConfig
from slagen.benchmark import run as bench
from slagen.benchmark.config import BenchConfig
from slagen.cli import main as cli
from slagen.cli.main import run
from slagen.comparison import reports as two_reports
from slagen.comparison import run as comparison
from slagen.doctor import checks as doctor
from slagen.doctor import kernel_costs, selftest
from slagen.formats import headers, merge
from slagen.formats.sla import read_sla, weights_hash, write_sla
from slagen.generation import decode, generate, latents, pages, preflight, prompts, provenance, replay
from slagen.generation import estimate as plan
from slagen.generation.config import GenerateConfig
from slagen.generation.embeddings import tensor_hash
from slagen.generation.peers import NAMES, TRAINER_NAMES
from slagen.maps import run as maps
from slagen.training import finetune
from slagen.training import preflight as training_preflight
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.data import prepare
from slagen.tuning import run as tuning
from slagen.wan import convert
from slagen.wan.folder import bundled_folder, describe_folder
from slagen.wan.transformer import load_transformer

GOLDEN = Path(__file__).parent / "golden"
RENEW = os.environ.get("SLAGEN_GOLDEN") == "renew"
HOW = "If that is meant: SLAGEN_GOLDEN=renew python -m pytest -n 0 tests/test_golden*.py, and look at git diff."

TASKS = (
    (generate, "generate"), (batch, "batch"), (ray_workers, "batch_on_ray"), (plan, "plan"), (plan, "models"),
    (registry, "describe"), (provenance, "describe"), (replay, "replay"), (decode, "decode"), (convert, "convert"),
    (merge, "merge"), (comparison, "compare"), (two_reports, "compare_reports"), (maps, "draw"), (tuning, "tune"),
    (pages, "write_page"), (finetune, "finetune"), (prepare, "prepare"), (bench, "bench"), (doctor, "examine"),
    (kernel_costs, "kernel_costs"), (selftest, "claim"),
)  # fmt: skip


def to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def compare(name: str, found: dict[str, Any], *, forever: bool = False) -> None:
    """Hold entries against those of a golden file. `forever`: an entry that is there is never written anew."""
    path = GOLDEN / name
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if RENEW:
        kept = {key: known.get(key, value) if forever else value for key, value in found.items()}
        lines = [f"{to_line(key)}: {to_line(value)}" for key, value in kept.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        known = kept
    missing, added = known.keys() - found.keys(), found.keys() - known.keys()
    assert not missing and not added, f"{name}: gone: {sorted(missing)}; new: {sorted(added)}. {HOW}"
    for key, value in found.items():
        assert value == known[key], f"{name}, {key}. {'This may never change.' if forever else HOW}"


CHECKS = (  # of what lies at the paths of a command line, before its task
    (preflight, "check_run"), (preflight, "check_model"), (preflight, "check_processes"),
    (batch_preflight, "read_batch"), (training_preflight, "check_training"), (training_preflight, "check_data"),
    (provenance, "needed_all_of_torch"), (latents, "read_about"), (headers, "check_weights"), (prompts, "read_prompts"),
)  # fmt: skip


class Reached(BaseException):
    """A command has come to its task, with these arguments."""


def plain(value: Any) -> Any:
    """A value as JSON; of a config its class and the fields that are not at their defaults, wherever it is defined."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        set_fields = {"class": type(value).__name__}
        for field in dataclasses.fields(value):
            is_made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if is_made else field.default
            found = getattr(value, field.name)
            if found != default:
                set_fields[field.name] = plain(found)
        return set_fields
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, Path):
        return value.as_posix().replace(Path.home().as_posix(), "~")
    return value if isinstance(value, str | int | float | None) else str(value)


def replacement(name: str, task: Any) -> Any:
    """What stands in for a task: it ends the command, and tells the arguments that differ from the task's defaults."""
    signature = inspect.signature(task)

    def stop(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        told = {
            key: plain(value)
            for key, value in given.items()
            if not callable(value) and value != signature.parameters[key].default
        }
        raise Reached({"task": name, **told})

    return stop


@pytest.fixture
def no_tasks(monkeypatch, tmp_path):
    """Commands end where their work would begin; no CUDA device, no Ray, a folder with no more than
    an empty file of options, a prompt on stdin."""
    for module, name in TASKS:
        monkeypatch.setattr(module, name, replacement(name, getattr(module, name)))
    for module, name in CHECKS:
        monkeypatch.setattr(module, name, lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").touch()


def meaning(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command line comes to: the task with its arguments, or the exit code."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a prompt from stdin\n"), "utf-8"))
    try:
        code = run(shlex.split(line.removeprefix("slagen ")))
    except Reached as end:
        return end.args[0]
    return {"exit": code}


def command_lines() -> list[str]:
    lines = (GOLDEN / "command_lines.txt").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith("slagen ")))


def test_every_former_command_line_means_what_it_meant(no_tasks, monkeypatch, capsys):
    """Of the README, the documents, the tests, and of every option and alias. Refused ones are refused."""
    compare("command_lines.json", {line: meaning(line, monkeypatch) for line in command_lines()}, forever=True)
    capsys.readouterr()


def test_defaults_of_the_configs():
    classes = (GenerateConfig, BatchConfig, DataConfig, FinetuneConfig, BenchConfig, SLAConfig)
    found = {}
    for config in classes:
        for field in dataclasses.fields(config):
            if field.default is not dataclasses.MISSING:
                found[f"{config.__name__}.{field.name}"] = plain(field.default)
    compare("defaults.json", found)


def parameters(command: Any, name: str = "slagen"):
    """(command's name, option's spellings) of every option of a command and its subcommands."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield name, [*parameter.opts, *parameter.secondary_opts]
    for sub, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, f"{name} {sub}")


def test_every_option_and_alias_is_in_a_golden_command_line():
    """So that whoever adds one writes down what it means."""
    words = [shlex.split(line) for line in command_lines()]
    for command, names in parameters(typer.main.get_command(cli.app)):
        if command == "slagen":
            continue  # --version does no task
        start = command.split()
        given = {word.partition("=")[0] for line in words if line[: len(start)] == start for word in line}
        assert set(names) <= given, f"{command}: add a line with {sorted(set(names) - given)}. {HOW}"
    given = {word.lstrip("-").replace("_", "-").partition("=")[0] for line in words for word in line}
    lacking = {*NAMES, *TRAINER_NAMES} - given
    assert not lacking, f"add a line with {sorted(lacking)}. {HOW}"


def helps(command: Any, words: tuple[str, ...] = ()):
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, (*words, name))


def test_help_texts(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    found = {}
    for words in helps(typer.main.get_command(cli.app)):
        assert run([*words, "--help"]) == 0
        found["-".join(["slagen", *words]) + ".txt"] = capsys.readouterr().out
    folder = GOLDEN / "help"
    if RENEW:
        for name, text in found.items():
            (folder / name).write_text(text, encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == found.keys()
    for name, text in found.items():
        assert text == (folder / name).read_text(encoding="utf-8"), f"slagen {name} --help reads otherwise. {HOW}"


def jobs(tmp_path: Path, **settings: Any) -> list[dict[str, Any]]:
    """What a batch writes into its manifest for "a red circle" with these settings, before any model is loaded."""
    (tmp_path / "prompts.txt").write_text("a red circle moving right\n")
    settings = {"output": str(tmp_path / "out"), "device": "cpu", "seed": 1, "model": "tiny-wan", **settings}
    base = GenerateConfig("-", **settings)
    config = BatchConfig(str(tmp_path / "prompts.txt"), base, cache_dir=str(tmp_path / "cache"))

    def stop(event: Any) -> None:
        if event.kind == "plan":  # all is queued, and nothing is loaded
            raise Reached

    record = tmp_path / "out" / "manifest.jsonl"
    before = len(record.read_text().splitlines()) if record.exists() else 0
    with pytest.raises(Reached):
        batch.batch(config, stop)
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()[before:]]


CHANGED = {
    "nothing": {}, "negative_prompt": {"negative_prompt": "blur"}, "size": {"width": 96, "height": 64},
    "num_frames": {"num_frames": 9}, "fps": {"fps": 5}, "steps": {"steps": 3}, "flow_shift": {"flow_shift": 6.0},
    "guidance_scale": {"guidance_scale": 3.0}, "sampler": {"sampler": "euler"}, "sampler dpm++": {"sampler": "dpm++"},
    "seed": {"seed": 7}, "num_videos": {"seed": 11, "num_videos": 2}, "dtype": {"dtype": "bf16"},
    "dense": {"attention": "dense"}, "sparse": {"attention": "sparse", "allow_untrained": True},
    "linear": {"attention": "linear", "allow_untrained": True}, "backend": {"backend": "reference"},
    "sparsity": {"sparsity": 0.8}, "sla_topk": {"sla_topk": 0.3}, "block_m": {"block_m": 64},
    "block_n": {"block_n": 32},
}  # fmt: skip
SAME = {  # as the model has it, or without an influence on pixels
    "size": {"width": 128, "height": 128}, "sampler": {"sampler": "unipc"}, "sparsity": {"sparsity": 0.95},
    "dtype": {"dtype": "fp32"}, "block_m": {"block_m": 16}, "block_n": {"block_n": 16}, "timing": {"timing": "off"},
    "save_latents": {"save_latents": True}, "allow_untrained": {"allow_untrained": True},
    "overwrite": {"overwrite": True}, "local_files_only": {"local_files_only": True}, "model": {"model": None},
}  # fmt: skip


def entries(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Jobs as they are kept: the key without the hash of the weights' files, which is a matter of the files alone."""
    kept = []
    for job in found:
        settings = {**job["settings"], "seed": job["seed"]}
        assert job["key"] == manifest.digest(settings)
        del settings["weights_hash"]
        kept.append({"key": manifest.digest(settings), "settings": settings})
    return kept


def test_keys_of_jobs(tmp_path):
    """A new option at its default changes no key: a batch goes on after an upgrade, and makes nothing again."""
    found = {name: entries(jobs(tmp_path, **settings)) for name, settings in CHANGED.items()}
    metadata, tensors = read_sla(bundled_folder())
    write_sla(tensors, tmp_path / "sla.safetensors", dataclasses.replace(metadata, sampler_family="rcm"))
    rcm = {"weights": str(tmp_path / "sla.safetensors")}
    found["rcm"] = entries(jobs(tmp_path, **rcm))
    found["rcm, sigma_max"] = entries(jobs(tmp_path, **rcm, sigma_max=70.0))
    found["rcm, ode"] = entries(jobs(tmp_path, **rcm, ode=True))
    assert all(found.values())
    compare("manifest_keys.json", found, forever=True)


def test_what_changes_no_pixel_changes_no_key(tmp_path):
    (plain_job,) = jobs(tmp_path)
    for name, settings in SAME.items():
        assert not jobs(tmp_path, **settings), f"{name} at its default, or where it changes no pixel, makes another job"
    hashes = {"tiny-wan": plain_job["settings"]["weights_hash"]}
    for name, part in (("vae", "vae"), ("weights", "sla.safetensors")):
        (job,) = jobs(tmp_path, **{name: str(bundled_folder() / part)}, seed=2)
        hashes[f"tiny-wan, --{name} {part}"] = job["settings"]["weights_hash"]
    compare("weights_hashes.json", {**hashes, **tensors_of(bundled_folder())}, forever=True)


def tensors_of(folder: Path) -> dict[str, str]:
    """A hash of every tensor file of a model, and the one that reports tell of its transformer."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = {name: tensor_hash(tensor) for name, tensor in load_file(file).items()}
        found[file.relative_to(folder).as_posix()] = manifest.digest(tensors)
    transformer = load_transformer(describe_folder(folder, "tiny-wan"), torch.float32)
    return {**found, "model_hash": weights_hash(transformer)}
