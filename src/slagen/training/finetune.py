"""finetune(FinetuneConfig) -> FinetuneResult: fine-tune a Wan model with SLA, or resume what the folder holds."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch

from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.events import Event
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import append
from slagen.io.paths import check_utf8, user_path
from slagen.machine import pick_device
from slagen.training.checkpoints import Checkpoint, checkpoints, load_state, read_latest
from slagen.training.config import FinetuneConfig
from slagen.training.data import dataset, prepare
from slagen.training.data.dataset import Dataset
from slagen.training.distributed import join
from slagen.training.init_from import fit_to_mean
from slagen.training.log import Emit, cut_log
from slagen.training.loop import train
from slagen.training.metrics import TeacherErrors
from slagen.training.models import Models, build_models, checkpoint_bytes, memory_plan, recomputes
from slagen.training.output_folder import (
    MARK,
    check_disk_space,
    check_foreign,
    clear_folder,
    clear_log,
    hold_folder,
    sweep_folder,
)
from slagen.training.result import FinetuneResult, finish
from slagen.training.resume import compare_data_options, compare_settings, run_settings
from slagen.training.run import HeldOut, Run, choose_held_out, measure
from slagen.training.setup import Setup, check_setup, check_tokens
from slagen.training.trainer import Trainer
from slagen.video import check_ffmpeg


def finetune(config: FinetuneConfig, on_event: Emit = lambda event: None) -> FinetuneResult:
    """Fine-tune a Wan model with sparse-linear attention, or resume the run in the output folder.

    Args:
        on_event: called with each stage, clip, note and step, in the first process.
    Raises: UsageError for faulty data or changed settings, WeightsError for weights that do not fit,
        EnvironmentProblem for a package or device that is not there, SlagenError for a loss that is not finite or a
        full disk; KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written.
    """
    check_ffmpeg()
    device = pick_device(config.device)
    folder = user_path(config.output)
    check_utf8(folder)
    with join(device, config.parallel, config.context_parallel) as team, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
        setup = check_setup(config, folder, team, on_event if team.first else lambda event: None)
        kept = f"Checkpoints and prepared clips in {folder} are kept. Run the same command again to resume."
        with telling_what_is_kept(lambda: kept), hold_folder(folder) if team.first else nullcontext():
            try:
                return _run(setup)
            except torch.OutOfMemoryError as error:
                raise SlagenError(
                    "the GPU ran out of memory. Try --micro-batch 1. If that is not enough, start again with --restart "
                    "and one of these: --optimizer adamw8bit, --train lora, or clips of fewer frames."
                ) from error
            except OSError as error:
                raise SlagenError(
                    f"{error.filename or folder} cannot be read or written ({error.strerror or error}). Fix this and "
                    "run again to resume from the last checkpoint."
                ) from error


def _run(setup: Setup) -> FinetuneResult:
    """The whole training: data, models, steps, result."""
    folder, team = setup.folder, setup.team
    if team.first:
        sweep_folder(folder)
    team.wait()
    found = None if setup.config.restart else read_latest(folder)
    check_foreign(folder)
    settings, data = _load_data(setup, found)
    check_tokens(setup, data)
    setup.emit(Event("stage", "load"))
    models, trainer = _build_trainer(setup, data, found)
    if team.first:
        if setup.config.restart:
            clear_folder(folder)
        elif found is None:
            clear_log(folder)  # of a run that wrote no checkpoint, perhaps with other settings
        append(folder / MARK, b"")
    team.wait()
    held_out = choose_held_out(setup, data)
    for path in checkpoints(folder):
        if found is None or path > found.path:
            setup.emit(Event("warning", f"{path} is corrupt; skipping it"))
    before = _begin(setup, trainer, held_out) if found is None else _resume(setup, trainer, found)
    step, seconds = (0, 0.0) if found is None else (found.state.step, found.state.seconds)
    run = Run(setup, settings, data, models, trainer, held_out, before)
    if team.first:
        cut_log(folder, step)
    seconds = train(run, step, seconds)
    run.stop.clear()
    return finish(run, seconds)


def _load_data(setup: Setup, found: Checkpoint | None) -> tuple[dict[str, Any], Dataset]:
    """The run's settings and data; settings are compared with the checkpoint's before and after data are prepared."""
    settings, folder = run_settings(setup), setup.folder
    if found is not None:
        compare_settings(found.state.settings, settings, folder, but=("data", "data_options"))
        compare_data_options(found.state.settings.get("data_options"), settings["data_options"], folder)
    data = _prepared(setup)
    settings = {**settings, "data": data.hash}
    if found is not None:
        compare_settings(found.state.settings, settings, folder, but=("data_options",))
    return settings, data


def _prepared(setup: Setup) -> Dataset:
    """The prepared data set; raw data are prepared by the first process."""
    data, source, cache = setup.config.data, setup.weights.source, setup.cache
    if data.path is not None and dataset.is_prepared(user_path(data.path)):
        for name in ("width", "num_frames", "fps", "held_out"):
            if getattr(data, name) is not None:
                option = {"width": "--size"}.get(name, f"--{name.replace('_', '-')}")
                raise UsageError(f"{data.path} is already prepared, so {option} has no effect. Leave it out.")
        if data.no_upscale:
            raise UsageError(f"{data.path} is already prepared, so --no-upscale has no effect. Leave it out.")
        return dataset.open_dataset(user_path(data.path), source, cache)
    folder = setup.folder / "data"
    if setup.team.first:
        prepare.prepare(data, setup.base, folder, cache, setup.config.seed, setup.emit)
    setup.team.wait()
    return dataset.open_dataset(folder, source, cache)


def _build_trainer(setup: Setup, data: Dataset, found: Checkpoint | None) -> tuple[Models, Trainer]:
    """Load the models onto the device, after the memory estimate and the check of the disk."""
    models, team, recipe = build_models(setup), setup.team, setup.recipe
    tokens = max(map(setup.num_tokens, data.training))
    parts = team.size if team.kind == "fsdp" else 1
    recomputed = recomputes(setup.config.checkpointing, team.device)
    setup.emit(Event("note", memory_plan(models.student, models.teacher, recipe, tokens, parts, recomputed)))
    if team.first and (found is None or found.state.step < setup.schedule.steps):
        check_disk_space(setup.folder, checkpoint_bytes(models.student, recipe), setup.config.restart)
    if team.kind != "fsdp":
        models.student.to(team.device)
    teacher = team.share_frozen(models.teacher)
    if setup.config.init_from is not None and found is None:  # a checkpoint has what became of it
        fit_to_mean(setup, models, data)
    return models, Trainer(models.student, teacher, data, recipe, team)


def _begin(setup: Setup, trainer: Trainer, held_out: HeldOut) -> TeacherErrors:
    """Measure the errors before the first step. Raises WeightsError where they are NaN or Inf."""
    before = measure(trainer, held_out, setup.emit, "before training")
    if not math.isfinite(before.error):
        raise WeightsError(
            f"{setup.weights.source.name} with these weights predicts NaN or Inf before any training. Download the "
            "weights again, or try --dtype fp32."
        )
    return before


def _resume(setup: Setup, trainer: Trainer, found: Checkpoint) -> TeacherErrors:
    """Load a checkpoint into the trainer; returns the errors before the first step."""
    load_state(trainer, found)
    setup.emit(Event("note", f"resuming from step {found.state.step} of {setup.schedule.steps}"))
    return found.state.before
