"""finetune(FinetuneConfig) -> FinetuneResult: give a Wan model SLA, and see that it worked."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from slagen.attention import registry
from slagen.attention.registry import parameter_group
from slagen.attention.sla.method import branches_of
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.events import Event
from slagen.formats.model_files import SLA_FILE
from slagen.formats.sla import (
    SLAMetadata,
    find_sla_file,
    plain_name,
    read_metadata,
    trained_tensors,
    weights_hash,
    write_sla,
)
from slagen.generation.config import CACHE, GenerateConfig
from slagen.generation.embeddings import file_hashes, files_in
from slagen.generation.report import versions
from slagen.generation.resolve import find_weights, make_plan
from slagen.generation.session import Session
from slagen.interrupts import stopping
from slagen.io.files import append, delete, sweep, write_json, writing
from slagen.io.paths import check_utf8, user_path
from slagen.io.text import counted
from slagen.machine import peak_memory_gib, pick_device, pick_dtype
from slagen.training.checkpoints import FOLDER, KEPT, checkpoints, load_state, read_latest, save_state
from slagen.training.comparison import side_by_side
from slagen.training.config import FinetuneConfig
from slagen.training.data import dataset, prepare
from slagen.training.data.dataset import Clip, Dataset
from slagen.training.distributed import Team, join, own_part, whole
from slagen.training.log import CLIPS, LOG, add_line, cut_log, validated
from slagen.training.loop import tensorboard_writer
from slagen.training.lora import LORA_RANK, add_lora, lora_config
from slagen.training.metrics import LEVELS, layer_errors, noise_levels, velocity_error
from slagen.training.models import memory_plan
from slagen.training.output_folder import MARK, RESULT, TENSORBOARD, TRANSFORMER_FILE, hold_folder
from slagen.training.page import PAGE, write_page
from slagen.training.result import FinetuneResult
from slagen.training.resume import ANYTIME, compare_settings
from slagen.training.setup import default_model, training_schedule
from slagen.training.trainer import Recipe, StepResult, Trainer, optimizer_8bit
from slagen.video import check_ffmpeg, read_mp4, write_mp4
from slagen.wan.install import apply_sla, install_projections, load_sla
from slagen.wan.loading import load_pipeline
from slagen.wan.processor import install, installation
from slagen.wan.sequence_parallel import split_tokens
from slagen.wan.transformer import load_transformer
from slagen.wan.vae import decode_latents

MAX_HELD_OUT = 16  # clips that an error is measured on
SHOWN_PROMPTS = 2  # prompts with side-by-side clips


@dataclass
class Progress:
    """What is told after a step; as a line of the log, its fields."""

    step: int
    steps: int
    loss: float
    error: float | None
    grad_norm: float
    lr: float
    proj_norms: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    memory_gib: float = 0.0
    seconds: float = 0.0
    left_s: float = 0.0


Tell = Callable[[Event | Progress], None]


def finetune(config: FinetuneConfig, on_event: Tell = lambda event: None) -> FinetuneResult:
    """Fine-tune a model with SLA inside, or go on with what the output folder holds.

    Args:
        on_event: told of stages, clips, notes and steps, in the first process.
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
        tell = on_event if team.first else lambda event: None
        run = _Run(config, folder, team, tell)
        with hold_folder(folder) if team.first else nullcontext():
            try:
                return run.run()
            except torch.OutOfMemoryError as error:
                raise SlagenError(
                    "the GPU ran out of memory. Try --micro-batch 1; or begin anew, with --restart, with --optimizer "
                    "adamw8bit, --train lora, or data of fewer frames."
                ) from error
            except OSError as error:
                raise SlagenError(
                    f"{error.filename or folder}: {error.strerror or error}. Mend that, start again, and it goes on "
                    "from its last checkpoint."
                ) from error


class _Stopped(Exception):
    """A clip was given up, for the run is to end."""


class _Run:
    def __init__(
        self, config: FinetuneConfig, folder: Path, team: Team, tell: Callable[[Event | Progress], None]
    ) -> None:
        self.config, self.folder, self.team, self.tell = config, folder, team, tell
        self.method = registry.get(config.attention)
        self.is_dense = self.method.family == "dense"
        base = GenerateConfig(
            "-", model=default_model(config.model, str(team.device)),
            weights=config.weights, local_files_only=config.local_files_only,
            allow_untrained=True, attention="dense" if self.is_dense else "sla",
            device=str(team.device), dtype=config.dtype, backend=config.backend,
        )  # fmt: skip
        self.base = base
        self.weights = find_weights(base, lambda text: tell(Event("note", text)))
        if config.from_dense and config.weights is not None and self.weights.source.weights is None:
            raise UsageError(
                "--from-dense begins without SLA weights, but --weights gives some. Leave one of them out."
            )
        if self.weights.source.weights is None:
            self.base = dataclasses.replace(base, weights=None)  # SLA weights are no concern of the dense model's
        if not config.from_dense and not self.is_dense and self.weights.sla_path is None:
            raise WeightsError(
                f"{self.weights.source.name} has no SLA weights to go on from. Begin with --from-dense, or give some "
                "with --weights."
            )
        if (file := self.weights.source.weights) is not None and file.suffix == ".gguf":
            raise UsageError(f"{file} is quantised, and trains no further. Give the model in full precision.")
        if config.optimizer == "adamw8bit" and team.kind == "fsdp":
            raise UsageError("adamw8bit does not know FSDP's parts. Leave --optimizer out, or take --parallel ddp.")
        self.sla = config.sla(self.weights.sla)
        if config.anneal_from is not None and config.anneal_from > self.sla.sparsity:
            raise UsageError(
                f"anneal_from is {config.anneal_from:g}, but sparsity rises from there to {self.sla.sparsity:g}. "
                "Give less."
            )
        self.schedule = training_schedule(config, self.weights.source.defaults.training)
        if self.schedule.batch_size % team.data_size:
            raise UsageError(
                f"batch_size is {self.schedule.batch_size}, but {team.data_size} processes share it. Give a multiple."
            )
        dtype = pick_dtype(config.dtype, team.device)
        dtype = torch.float32 if dtype == torch.float16 else dtype  # a card without bf16
        heads = self.weights.source.shape.num_heads
        if heads % config.context_parallel:
            raise UsageError(
                f"context_parallel is {config.context_parallel}, but must divide the model's {heads} heads."
            )
        if not self.is_dense:
            about = self.weights.source.head_dim, team.device, dtype
            assert self.method.check is not None
            self.method.check(self.method.pick_backend(config.backend, *about), *about, self.sla)
        if config.train == "lora":
            lora_config()
        if config.optimizer == "adamw8bit":
            optimizer_8bit()
        read = [self.weights.source.folder, config.weights, None if config.from_dense else self.weights.sla_path]
        written = [folder, *(folder / name for name in (SLA_FILE, TRANSFORMER_FILE, "transformer"))]
        if {user_path(p).resolve() for p in read if p is not None} & {path.resolve() for path in written}:
            raise UsageError(
                f"model or weights come from {folder}, where the result would be written over them. Give another "
                "--output."
            )
        self.recipe = Recipe(
            self.schedule, config.loss, config.layer_loss, config.weight_decay, config.max_grad_norm, config.optimizer,
            config.seed, dtype,
        )  # fmt: skip
        self.cache = user_path(CACHE)
        self.stop = threading.Event()

    def run(self) -> FinetuneResult:
        """Everything, from the data to the page."""
        if self.team.first:
            self._sweep()
        self.team.wait()
        found = None if self.config.restart else read_latest(self.folder)
        self._check_foreign()
        self.settings = self._settings()
        if found is not None:  # before data are made, and after
            compare_settings(found[1].get("settings"), self.settings, self.folder, but=("data", "data_options"))
            self._compare_data_options(found[1]["settings"].get("data_options"))
        self.data = self._data()
        self.settings["data"] = self.data.hash
        if found is not None:
            compare_settings(found[1].get("settings"), self.settings, self.folder, but=("data_options",))
        self._check_tokens()
        self.tell(Event("stage", "load"))
        self.student, self.teacher = self._models()
        tokens = max(map(self._tokens, self.data.training))
        parts = self.team.size if self.team.kind == "fsdp" else 1
        plan = memory_plan(self.student, self.teacher, self.recipe, tokens, parts, self._recomputes())
        self.tell(Event("note", plan))
        if self.team.first and (found is None or found[1]["step"] < self.schedule.steps):
            self._check_room()
        if self.team.kind != "fsdp":
            self.student.to(self.team.device)
        self.teacher = self.team.share_frozen(self.teacher)
        trainer = Trainer(self.student, self.teacher, self.data, self.recipe, self.team)
        self.trainer = trainer
        if self.team.first:
            if self.config.restart:
                self._clear()
            elif found is None:
                self._clear_log()  # of a run that came to no checkpoint, with other settings perhaps
            append(self.folder / MARK, b"")
        self.team.wait()
        self.examples = [self.data.example(clip) for clip in self.data.held_out[:MAX_HELD_OUT]]
        self.levels = noise_levels(LEVELS, self.schedule.log_sigma_mean, self.schedule.log_sigma_std)
        step, spent = 0, 0.0
        for path in checkpoints(self.folder):
            if found is None or path > found[0]:
                self.tell(Event("warning", f"{path} is broken, so it is passed over"))
        if found is not None:
            path, about = found
            load_state(trainer, path, about)
            step, spent, self.before = about["step"], about["seconds"], about["before"]
            self.tell(Event("note", f"going on from step {step} of {self.schedule.steps}"))
        else:
            self.tell(Event("stage", "measure"))
            self.before = {"error": self._error(), "layers": self._layers()}
            if not math.isfinite(self.before["error"]):
                raise WeightsError(
                    f"the velocity of {self.weights.source.name} with these weights is not finite before any step. "
                    "Get them again, or try --dtype fp32."
                )
        if self.team.first:
            cut_log(self.folder, step)
        if step < self.schedule.steps:
            self._validate_if_due(step)
        self.tell(Event("stage", "train"))
        spent = self._train(step, spent)
        self.stop.clear()
        return self._finish(spent)

    def _clear(self) -> None:
        """Take away what a run before left, and nothing else."""
        paths = [*checkpoints(self.folder), self.folder / TENSORBOARD]
        if (self.folder / "transformer" / MARK).is_file():
            paths.append(self.folder / "transformer")
        for path in [*paths, *(self.folder / name for name in (RESULT, PAGE, SLA_FILE, TRANSFORMER_FILE))]:
            delete(path)
        self._clear_log()

    def _sweep(self) -> None:
        """Clear away what killed runs left, of which this one, which has the folder, is the only one alive."""
        for folder in (self.folder, self.folder / FOLDER, self.folder / CLIPS):
            sweep(folder)
        for left in (self.folder / FOLDER).glob("step-*.part"):  # as versions before left them
            delete(left)

    def _clear_log(self) -> None:
        """Take away the log and the clips that it speaks of."""
        clips = [*(self.folder / CLIPS).glob("step-*.mp4"), *(self.folder / CLIPS).glob("dense-*.mp4")]
        for path in [*clips, self.folder / LOG]:
            delete(path)

    def _check_foreign(self) -> None:
        """Raise UsageError where the result would be written over something that no run here has made."""
        base = self.folder / "transformer"
        ours = any((self.folder / name).is_file() for name in (MARK, RESULT)) or checkpoints(self.folder)
        found = [] if ours else [self.folder / name for name in (SLA_FILE, TRANSFORMER_FILE)]
        for path in [*found, *([] if (base / MARK).is_file() else [base])]:
            if path.exists():
                raise UsageError(f"{path} is there, and no finetune made it. Give another --output.")

    def _compare_data_options(self, before: Any) -> None:
        """Raise UsageError for data that are sure to be others, before they are made; their hash decides in the end."""
        now = self.settings["data_options"]
        both = {name for name, value in (before or {}).items() if value is not None and now.get(name) is not None}
        compare_settings({name: before[name] for name in both}, {name: now[name] for name in both}, self.folder, but=())

    def _data(self) -> Dataset:
        """The prepared data, prepared by the first process where it is raw."""
        data, source, cache = self.config.data, self.weights.source, self.cache
        if data.path is not None and dataset.is_prepared(user_path(data.path)):
            for name in ("width", "num_frames", "fps", "held_out"):
                if getattr(data, name) is not None:
                    option = {"width": "--size"}.get(name, f"--{name.replace('_', '-')}")
                    raise UsageError(f"{data.path} is prepared already, so {option} changes nothing. Leave it out.")
            return dataset.open_dataset(user_path(data.path), source, cache)
        folder = self.folder / "data"
        if self.team.first:
            prepare.prepare(data, self.base, folder, cache, self.config.seed, self.tell)
        self.team.wait()
        return dataset.open_dataset(folder, source, cache)

    def _check_room(self) -> None:
        """Raise SlagenError where the disk does not hold the checkpoints, and one more while it is written."""
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        each = (8 + (2 if self.config.optimizer == "adamw8bit" else 8)) * trained  # weights, average, optimiser
        old = [file for path in checkpoints(self.folder) for file in files_in(path)]
        more = KEPT + 1 - (0 if self.config.restart else len(checkpoints(self.folder)))
        free = shutil.disk_usage(self.folder).free + (sum(f.stat().st_size for f in old) if self.config.restart else 0)
        if free < more * each:
            raise SlagenError(
                f"{self.folder} has {free / 2**30:.2g} GiB free, but {more} checkpoints of {each / 2**30:.2g} GiB each "
                "must fit. Free some space, or give another --output."
            )

    def _settings(self) -> dict[str, Any]:
        """All that changes what is learnt, but for the data themselves, to be compared when a run goes on."""
        fields = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in ANYTIME}
        fields["lora_rank"] = (self.config.lora_rank or LORA_RANK) if self.config.train == "lora" else None
        schedule = {k: v for k, v in dataclasses.asdict(self.schedule).items() if k not in ANYTIME}
        source = self.weights.source
        files, sla = dataset.transformer_files(source), self.weights.sla_path
        if sla is not None and not self.config.from_dense and (self.weights.sla_alone or sla.is_file()):
            files.append(find_sla_file(sla) if self.weights.sla_alone else sla)
        options = {k: v for k, v in dataclasses.asdict(self.config.data).items() if k not in ("path", "self_generate")}
        return json.loads(json.dumps({
            **fields, **schedule, **self.sla.to_dict(), "data_options": options, "dtype": str(self.recipe.dtype),
            "model": source.name, "weights_hash": file_hashes(files, self.cache),
        }))  # fmt: skip

    def _tokens(self, clip: Clip) -> int:
        patch = self.weights.source.patch_size
        return math.prod(size // part for size, part in zip(clip.shape[1:], patch, strict=True))

    def _check_tokens(self) -> None:
        least = min(map(self._tokens, [*self.data.training, *self.data.held_out]))
        if not self.is_dense and not self.method.applies(self.sla, least):
            raise UsageError(
                f"a clip has {counted(least, 'token')}, fewer than 2 key blocks of {self.sla.block_n}, so nothing can "
                "be left out. Give larger or longer clips, or a smaller --block-n."
            )
        parts = self.config.context_parallel
        for clip in [*self.data.training, *self.data.held_out]:
            if self._tokens(clip) % parts:
                raise UsageError(
                    f"a clip of {clip.caption[:40]!r} has {self._tokens(clip)} tokens, which {parts} processes cannot "
                    "share evenly. Give another --context-parallel, or data of another size."
                )

    def _recomputes(self) -> bool:
        return self.team.device.type == "cuda" if self.config.checkpointing is None else self.config.checkpointing

    def _models(self) -> tuple[Any, Any]:
        """The student with its attention, and its frozen teacher."""
        config, source = self.config, self.weights.source
        student = load_transformer(source, torch.float32)
        self.base_hash = weights_hash(student)
        self.steps_before = 0
        method, branches = self.method, branches_of(self.method)
        if self.is_dense:
            install(student, None)
        elif config.from_dense or self.weights.sla_path is None:
            apply_sla(student, self.sla, backend=config.backend, branches=branches)
            for name, parameter in student.named_parameters():
                group = method.group(name)
                if group is not None and group.identity and parameter.ndim == 2:  # O^l itself, to begin with
                    torch.nn.init.eye_(parameter)
        elif self.weights.sla_alone:
            self.steps_before = read_metadata(self.weights.sla_path).steps
            load_sla(
                student, self.weights.sla_path, config=self.sla, backend=config.backend, branches=branches,
                allow_untrained=True, base_hash=self.base_hash,
            )  # fmt: skip
        else:
            install_projections(
                student, self.weights.sla_path, self.sla, backend=config.backend, branches=branches,
                allow_untrained=True,
            )  # fmt: skip
        if config.train == "lora":
            add_lora(student, config.lora_rank or LORA_RANK, config.seed)
        for name, parameter in student.named_parameters():
            group = method.group(name)
            trained = {
                "all": True, "attn": ".attn1." in name, "proj": group is not None,
                "lora": group is not None or ".lora_" in name,
            }[config.train]  # fmt: skip
            parameter.requires_grad_(trained and (group is None or group.used))
        if self._recomputes():
            student.enable_gradient_checkpointing()
        teacher = load_transformer(source, self.recipe.dtype)
        install(teacher, None)
        if self.team.context_group is not None:
            for transformer in (student, teacher):
                split_tokens(transformer, self.team.context_group)
        return student.train(), teacher.requires_grad_(False)

    def _train(self, step: int, spent: float) -> float:
        """The steps that are left; returns the seconds of all of them."""
        steps, trainer, team = self.schedule.steps, self.trainer, self.team
        save_every = self.config.save_every or max(10, steps // 10)
        first, before, saved = step, spent, step
        began = time.monotonic()
        text = "a checkpoint after this step, then the end; press Ctrl-C again to stop now"
        with (
            stopping(self.stop, lambda: self.tell(Event("warning", text)), repeated_s=0 if team.size == 1 else 5),
            tensorboard_writer(self.folder, self.config.tensorboard and team.first, step, self.tell) as board,
        ):
            while step < steps:
                if team.agree(self.stop.is_set()):  # during a validation
                    if step > saved:
                        self._save(step, spent)
                    raise KeyboardInterrupt
                self._anneal(step)
                start = time.monotonic()
                result = trainer.step(step)
                step += 1
                spent = before + time.monotonic() - began
                self._told(step, first, result, spent, before, time.monotonic() - start, board)
                ending = team.agree(self.stop.is_set())
                if ending or step % save_every == 0 or step == steps:
                    self._save(step, spent)
                    saved = step
                if ending and step < steps:
                    raise KeyboardInterrupt
                if step < steps:
                    self._validate_if_due(step)
        self._anneal(steps)
        return spent

    def _anneal(self, step: int) -> None:
        """Sparsity rises over the first half of the steps, where that is asked for."""
        start = self.config.anneal_from
        if start is None:
            return
        part = min(1.0, 2 * step / self.schedule.steps)
        sla = dataclasses.replace(self.sla, sparsity=start + (self.sla.sparsity - start) * part)
        for block in self.student.blocks:
            block.attn1.processor.config = sla

    def _told(
        self, step: int, first: int, result: StepResult, spent: float, before: float, seconds: float, board: Any
    ) -> None:
        """One line of the log, and of TensorBoard's."""
        norms = [
            float(whole(p.detach()).norm()) for name, p in self.student.named_parameters()
            if parameter_group(name) is not None and name.endswith(".weight")
        ]  # fmt: skip
        if not self.team.first:
            return
        steps = self.schedule.steps
        progress = Progress(
            step, steps, result.loss, result.error, result.grad_norm, result.lr, norms, result.num_tokens / seconds,
            peak_memory_gib(self.team.device), spent, (spent - before) / (step - first) * (steps - step),
        )  # fmt: skip
        add_line(self.folder, "step", vars(progress))
        if board is not None:
            values = {"loss": result.loss, "error": result.error, "grad_norm": result.grad_norm, "lr": result.lr}
            for name, value in values.items():
                if value is not None:
                    board.add_scalar(f"train/{name}", value, step)
            for layer, norm in enumerate(norms):
                board.add_scalar(f"proj_l/{layer:02d}", norm, step)
        self.tell(progress)

    def _save(self, step: int, spent: float) -> None:
        about = {"settings": self.settings, "seconds": spent, "before": self.before, "versions": versions()}
        save_state(self.trainer, self.folder, step, about)

    def _error(self) -> float:
        return velocity_error(
            self.student, self.teacher, self.examples, self.levels, device=self.team.device,
            autocast=self.trainer.autocast,
        )  # fmt: skip

    def _layers(self) -> list[float]:
        return layer_errors(
            self.student, self.teacher, self.examples[:2], self.levels[::2], device=self.team.device,
            autocast=self.trainer.autocast,
            total=self.team.over_context if self.team.context_group is not None else lambda sums: sums,
        )  # fmt: skip

    def _validate_if_due(self, step: int) -> None:
        """Error and clips of the average weights, every so many steps; the log says which were done."""
        every = self.config.validate_every or max(1, self.schedule.steps // 2)
        if step % every == 0:
            with self.trainer.averaged():
                self._validate(step)

    def _validate(self, step: int) -> None:
        """Error to the teacher and clips of the student as it is, into the log and beside it; neither where it is
        asked to stop meanwhile."""
        if self.team.agree(self.team.first and step in validated(self.folder)):
            return
        self.tell(Event("stage", "measure"))
        self._anneal(self.schedule.steps)  # at the sparsity that it will have
        error = self._error() if step else self.before["error"]
        try:
            files = self._clips(step)
        except _Stopped:
            return
        if self.team.first:
            add_line(self.folder, "validation", {"step": step, "error": error, "clips": files})
            self.tell(
                Event("note", f"step {step}: error to the teacher {error:.4f} (it was {self.before['error']:.4f})")
            )

    def _clips(self, step: int) -> list[str]:
        """Side-by-side videos of fixed prompts and seeds, dense and the student."""
        files = []
        pipe = load_pipeline(
            self.weights.source, self.team.device, self.recipe.dtype, text_encoder=False, transformer=False
        )  # fmt: skip
        label = self.config.attention
        for number, clip in enumerate(self._shown_clips()):
            kept = self.folder / CLIPS / f"dense-{number}.mp4"
            file = self.folder / CLIPS / f"step-{step:06d}-{number}.mp4"
            kept.parent.mkdir(exist_ok=True)
            there = not self.team.agree(self.team.first and not kept.is_file())
            dense = None if there else self._sample(pipe, self.teacher, clip, number)
            student = self._sample(pipe, self.student, clip, number)
            if self.team.first:
                if dense is not None:
                    write_mp4(dense, kept, self.data.fps)
                beside = [read_mp4(kept), student]
                write_mp4(side_by_side(beside, ["dense", f"{label}, step {step}"]), file, self.data.fps, clip.caption)
                files.append(file.name)
        return files

    def _shown_clips(self) -> list[Clip]:
        """The first held-out clips of different prompts."""
        first: dict[str, Clip] = {}
        for clip in self.data.held_out:
            first.setdefault(clip.caption, clip)
        return list(first.values())[:SHOWN_PROMPTS]

    def _sample(self, pipe: Any, transformer: Any, clip: Clip, seed: int) -> Any:
        """Frames of a clip's prompt, as the model's own sampler makes them."""
        source = self.weights.source
        frames, height, width = clip.shape[1:]
        grid = source.spatial_factor
        config = dataclasses.replace(
            self.base, prompt=clip.caption, seed=seed, width=width * grid, height=height * grid,
            num_frames=(frames - 1) * source.temporal_factor + 1, timing="off",
        )  # fmt: skip
        plan = dataclasses.replace(make_plan(config, self.weights), attention=None)
        texts: list[Tensor] = [self.data.example(clip).text, self.data.negative_text()]
        names = ("prompt_embeds", "negative_prompt_embeds")
        embeds: dict[str, Tensor | None] = {
            name: text[None].to(self.team.device) for name, text in zip(names, texts, strict=True)
        }
        pipe.register_modules(transformer=transformer)
        training = transformer.training
        transformer.eval()
        try:
            with self.trainer.autocast():
                latents, _ = Session(plan, pipe=pipe).denoise(plan, embeds, self._stop_here)
            with torch.no_grad():
                return decode_latents(pipe.vae, latents).numpy()
        finally:
            transformer.train(training)

    def _stop_here(self, event: Event) -> None:
        if self.team.agree(self.stop.is_set()):
            raise _Stopped

    def _finish(self, spent: float) -> FinetuneResult:
        """Round the average weights, measure those, write them, and the page."""
        steps, trainer = self.schedule.steps, self.trainer
        dense = self.is_dense
        file = self.folder / (TRANSFORMER_FILE if dense else SLA_FILE)
        given = self.config.weights and user_path(self.config.weights)
        own_base = not dense and given == self.weights.source.weights is not None
        metadata = SLAMetadata(
            self.sla, self.weights.source.name, self.base_hash, self._trained(), self.steps_before + steps,
            "rcm" if self.weights.distilled else "flow",
        )  # fmt: skip
        with trainer.averaged(), torch.no_grad():
            wanted = {name: p for name, p in self.student.named_parameters() if self._is_written(name)}
            for name, parameter in wanted.items():
                if parameter_group(name) is None:
                    part = own_part(parameter)
                    part.copy_(part.half().float())  # as they are stored
            after, layers = self._error(), self._layers()
            if not math.isfinite(after):
                raise SlagenError(
                    f"the weights after step {steps} give numbers that are not finite, so none were written. Begin "
                    "anew with a lower --lr and --restart."
                )
            tensors = {}
            for name, parameter in wanted.items():  # one at a time, for they may not all fit a card
                tensor = whole(parameter)
                if self.team.first:
                    tensors[name] = tensor.cpu().clone()
            if self.team.first:
                write_sla(trained_tensors(tensors), file, None if dense else metadata)
                if own_base:
                    self._write_base()
            try:
                self._validate(steps)
            except SlagenError as error:
                if self.team.size > 1:  # the others wait for what this one would have done
                    raise
                self.tell(Event("warning", f"no clips of the last step: {error}"))
        result = FinetuneResult(
            self.folder, self.folder if own_base else file, steps, self.before["error"], after, spent,
            self.folder / PAGE, self.team.rank,
        )  # fmt: skip
        if self.team.first:
            content = {
                **{k: v.name if isinstance(v, Path) else v for k, v in vars(result).items()},
                "layer_errors_before": self.before["layers"], "layer_errors_after": layers, "settings": self.settings,
                "versions": versions(),
            }  # fmt: skip
            write_json(self.folder / RESULT, content)
            self._write_page(result, layers)
        self.team.wait()
        return result

    def _write_page(self, result: FinetuneResult, layers: list[float]) -> None:
        before, after = result.teacher_error_before, result.teacher_error_after
        sparsity = "" if self.is_dense else f", sparsity {self.sla.sparsity:g}"
        facts = {
            "model": self.weights.source.name, "attention": self.config.attention + sparsity,
            "trained": self.config.train, "loss": self.config.loss, "steps": str(self.schedule.steps),
            "error to the teacher": f"{before:.4f} before, {after:.4f} after ({1 - after / (before or 1):.0%} less)",
            "clips": f"{len(self.data.training)} to train on, {len(self.data.held_out)} held out",
            "time": f"{result.seconds / 60:.1f} min",
        }  # fmt: skip
        attention = "SLA" if self.config.attention == "sla" else f"{self.config.attention} attention"
        title = f"{self.folder.resolve().name}: {self.weights.source.name} with {attention}"
        captions = [clip.caption for clip in self._shown_clips()]
        write_page(self.folder, title, facts, {"before": self.before["layers"], "after": layers}, captions)

    def _is_written(self, name: str) -> bool:
        """Whether a parameter goes into the result: what was trained, now or before, and for a control all of it."""
        record = installation(self.student)
        before = {} if record is None else record.replaced
        is_changed = name in self.trainer.named or parameter_group(name) is not None or plain_name(name) in before
        return is_changed or self.is_dense

    def _write_base(self) -> None:
        """The transformer that SLA was trained on, beside SLA's weights, where no model's name stands for it."""
        final = self.folder / "transformer"
        try:
            with writing(final) as part:
                load_transformer(self.weights.source, self.recipe.dtype).save_pretrained(part)
                (part / MARK).touch()
        except (OSError, SafetensorError) as error:
            raise SlagenError(f"{final} could not be written ({error}). Free some space, and start again.") from error

    def _trained(self) -> str:
        return self.config.train if self.config.attention == "sla" else f"{self.config.train}, {self.config.attention}"
