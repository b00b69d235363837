"""The result of a training: the weights it writes, their error to the dense teacher, result.json and the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from slagen.attention.learned import name_in_files
from slagen.attention.registry import parameter_group
from slagen.attention.schedule import span
from slagen.errors import SlagenError
from slagen.events import Event
from slagen.formats.model_files import SLA_FILE
from slagen.formats.sla import SLAMetadata, plain_name, trained_tensors, write_sla
from slagen.generation import report
from slagen.io.files import write_json, writing
from slagen.io.paths import user_path
from slagen.packages import versions
from slagen.settings import to_fields
from slagen.training.comparison import shown_clips
from slagen.training.distributed import full_tensor, local_shard
from slagen.training.metrics import TeacherErrors
from slagen.training.output_folder import MARK, RESULT, TRANSFORMER_FILE
from slagen.training.page import PAGE, Trained, write_page
from slagen.training.run import Run, measure
from slagen.training.setup import Setup
from slagen.training.validation import validate
from slagen.wan.processor import installation
from slagen.wan.transformer import load_transformer


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a training.

    Args:
        output: the folder. weights: what `slagen generate --weights` takes: the file, or the folder where the
            transformer that was trained is no model's own and so lies beside it.
        teacher_error_before, teacher_error_after: relative L2 error of the velocity to the dense teacher's, on clips
            that were never trained on, without guidance; after: of the very weights that were written.
        steps: of the optimiser, in all. seconds: of training, in all. page: curves and clips.
        rank: of the process that says so, under torchrun.
    """

    output: Path
    weights: Path
    steps: int
    teacher_error_before: float
    teacher_error_after: float
    seconds: float
    page: Path
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def finish(run: Run, seconds: float) -> FinetuneResult:
    """Round the averaged weights to float16, measure their error, and write weights, result and page.

    Raises: SlagenError where they produce NaN or Inf, or the disk is full.
    """
    setup, steps = run.setup, run.setup.schedule.steps
    folder, dense = setup.folder, setup.is_dense
    file = folder / (TRANSFORMER_FILE if dense else SLA_FILE)
    given = setup.config.weights and user_path(setup.config.weights)
    own_base = not dense and given == setup.weights.source.weights is not None
    with run.trainer.averaged(), torch.no_grad():
        wanted = {name: p for name, p in run.trainer.student.named_parameters() if _is_written(run, name)}
        _round(wanted)
        after = measure(run.trainer, run.held_out, setup.emit, f"after step {steps}")
        if not math.isfinite(after.error):
            raise SlagenError(
                f"the weights after step {steps} produce NaN or Inf, so none were written. Start again with "
                "--restart and a lower --lr."
            )
        tensors = _gather(wanted, run.is_first)
        if run.is_first:
            write_sla(trained_tensors(tensors), file, None if dense else _metadata(run))
            if own_base:
                _write_base(setup)
        try:
            validate(run, steps)
        except SlagenError as error:
            if setup.team.size > 1:  # the other processes wait for this one
                raise
            setup.emit(Event("warning", f"the videos of the last step were not written: {error}"))
    result = FinetuneResult(
        folder, folder if own_base else file, steps, run.before.error, after.error, seconds, folder / PAGE,
        setup.team.rank,
    )  # fmt: skip
    if run.is_first:
        setup.emit(Event("stage", "write", about="the result and its page"))
        _write_result(run, result, after)
    setup.team.wait()
    return result


def _is_written(run: Run, name: str) -> bool:
    """Whether a parameter is written: those trained, now or before; for a dense control all of them."""
    record = installation(run.models.student)
    before = {} if record is None else record.replaced
    is_changed = name in run.trainer.named or parameter_group(name) is not None or plain_name(name) in before
    return is_changed or run.setup.is_dense


def _round(parameters: Mapping[str, Tensor]) -> None:
    """Round parameters in place to the float16 that they are stored in."""
    for name, parameter in parameters.items():
        if parameter_group(name) is None:
            part = local_shard(parameter)
            part.copy_(part.half().float())


def _gather(parameters: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The full tensors on the CPU, in the process that keeps them; every process takes part."""
    tensors = {}
    for name, parameter in parameters.items():  # one at a time: all together may not fit on the GPU
        tensor = full_tensor(parameter)
        if keep:
            tensors[name] = tensor.cpu().clone()
    return tensors


def _metadata(run: Run) -> SLAMetadata:
    setup = run.setup
    train, attention, method = setup.config.train, setup.config.attention, name_in_files(setup.method)
    return SLAMetadata(
        setup.attention, setup.weights.source.name, run.models.base_hash,
        train if attention == method else f"{train}, {attention}", run.models.steps_before + setup.schedule.steps,
        "rcm" if setup.weights.distilled else "flow", method=method, layer_sparsities=setup.layer_sparsities,
    )  # fmt: skip


def _write_base(setup: Setup) -> None:
    """Write the transformer that the attention was trained on beside its weights, where no preset or folder has it."""
    final = setup.folder / "transformer"
    try:
        with writing(final) as part:
            load_transformer(setup.weights.source, setup.recipe.dtype).save_pretrained(part)
            (part / MARK).touch()
    except (OSError, SafetensorError) as error:
        raise SlagenError(f"{final} could not be written ({error}). Free some space and run again.") from error


def _write_result(run: Run, result: FinetuneResult, after: TeacherErrors) -> None:
    """Write result.json, with paths relative to it, and the page."""
    content = {
        **result.to_dict(), "output": result.output.name, "weights": result.weights.name, "page": result.page.name,
        "layer_errors_before": run.before.layers, "layer_errors_after": after.layers, "settings": run.settings,
        "versions": versions(),
    }  # fmt: skip
    write_json(run.setup.folder / RESULT, content)
    _write_page(run, result, after)


def _write_page(run: Run, result: FinetuneResult, errors: TeacherErrors) -> None:
    setup, config, source = run.setup, run.setup.config, run.setup.weights.source
    before, after = result.teacher_error_before, result.teacher_error_after
    about = "" if setup.is_dense else _told(setup)
    facts = {
        "model": source.name, "attention": config.attention + about, "trained": config.train, "loss": config.loss,
        "steps": str(result.steps),
        "relative L2 error to the dense teacher": f"{before:.4f} before, {after:.4f} after "
        f"({abs(1 - after / (before or 1)):.0%} {'lower' if after <= before else 'higher'})",
        "clips": f"{len(run.data.training)} for training, {len(run.data.held_out)} held out",
        "time": f"{result.seconds / 60:.1f} min",
    }  # fmt: skip
    attention = "SLA" if config.attention == "sla" else f"{config.attention} attention"
    title = f"{setup.folder.resolve().name}: {source.name} with {attention}"
    layers = {"before": run.before.layers, "after": errors.layers}
    captions = [clip.caption for clip in shown_clips(run.data)]
    commands = _next_commands(setup, result, captions[0] if captions else "a red circle moving right")
    write_page(setup.folder, Trained(title, before, after, layers, captions, run.data.fps, facts, commands))


def _next_commands(setup: Setup, result: FinetuneResult, prompt: str) -> list[tuple[str, str]]:
    """What to run next: a video with the trained weights, and a comparison with dense attention."""
    asked = setup.config
    weights = str(result.weights)
    if weights.startswith(str(setup.folder)):  # as it was typed
        weights = asked.output.rstrip("/") + weights.removeprefix(str(setup.folder))
    model = "" if asked.model is None else f" --model {shlex.quote(report.shareable(asked.model) or '')}"
    own = f"--weights {shlex.quote(report.shareable(weights) or '')}"
    commands = [("A video with these weights", f"slagen generate {shlex.quote(prompt)}{model} {own}")]
    if not setup.is_dense:
        methods = f"--methods dense,{asked.attention}"
        commands[0] = (commands[0][0], f"{commands[0][1]} --attention {asked.attention}")
        commands.append(
            (
                "Beside dense attention, with times and errors",
                f"slagen compare {shlex.quote(prompt)}{model} {own} {methods}",
            )
        )
    return commands


def _told(setup: Setup) -> str:
    """The sparsity of a method that has one, otherwise its settings."""
    config = setup.attention
    if setup.layer_sparsities is not None:
        return f", {span(setup.layer_sparsities)} by layer"
    if (sparsity := getattr(config, "sparsity", None)) is not None:
        return f", sparsity {sparsity:g}"
    return "".join(f", {name.replace('_', ' ')} {value}" for name, value in to_fields(config).items())
