"""From what was asked to what will run: the model found, its weights looked at, every default filled in.

Nothing is loaded here; what can be refused is refused before minutes are spent on weights.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slagen import machine
from slagen.attention import registry
from slagen.attention.cost import dense_attention_flops
from slagen.attention.delta.method import with_delta
from slagen.attention.learned import label, suits
from slagen.attention.policy import DensePart, Remembered
from slagen.attention.protocol import Grid, Method
from slagen.attention.schedule import Schedule
from slagen.errors import EnvironmentProblem
from slagen.formats.kinds import TRANSFORMERS
from slagen.formats.lora import LoraFile
from slagen.formats.model_files import SLA_FILE
from slagen.formats.sla import read_metadata
from slagen.generation import report
from slagen.generation.config import GenerateConfig
from slagen.generation.few_steps import steps_warning
from slagen.generation.fill_defaults import (
    check_size,
    fill_defaults,
    recommended_notes,
    with_image,
    with_trained_layers,
)
from slagen.generation.lora import AskedLora, asked_loras
from slagen.generation.lora_files import describe_loras, find_loras
from slagen.generation.measured_dense import check_measured, measured_steps
from slagen.generation.picture import Picture
from slagen.generation.planned_attention import look_at_weights, plan_attention
from slagen.io.paths import user_path
from slagen.settings import changed
from slagen.wan.folder import ModelSource, bundled_folder, check_image_weights
from slagen.wan.models import resolve_model

# Recorded in another form: as "size"; only if they are not as trained; as options of the method.
RECORDED_OTHERWISE = ("width", "height", "block_m", "block_n", "attention_options")


@dataclass(frozen=True)
class Weights:
    """What will be loaded, for any number of videos.

    Args:
        source: the pipeline's folder, and the transformer file that replaces its own, if one does.
        trained_with: the config that the attention's weights were trained with, and the method's own where they are
            needed and not there; None where the attention runs without any.
        sla_path: the file that holds them: slagen's own where `sla_alone`, otherwise the transformer's or a side file;
            None where they are not there.
        distilled: whether they are made for the rCM sampler.
        layer_sparsities: the sparsity of each layer in training, where there was not one for all.
        few_steps: the word in a file's name or metadata that says it is distilled to few steps of another sampler.
        loras: the LoRA files.
    """

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    trained_with: Any
    sla_path: Path | None
    sla_alone: bool
    distilled: bool
    notes: tuple[str, ...] = ()
    few_steps: str = ""
    layer_sparsities: tuple[float, ...] | None = None
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A GenerateConfig with every default filled in, checked against the model, before any weight is read."""

    config: GenerateConfig
    weights: Weights
    attention: Any  # the attention method's config, with this video's options; None leaves what is installed as it is
    grid: Grid  # of the clip's tokens
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    backend: str | None = None  # what the attention will run on; None is PyTorch's choice for dense attention
    picture: Picture | None = None  # that the video begins with

    @property
    def num_tokens(self) -> int:
        """L, the tokens of the clip."""
        return self.grid.num_tokens

    @property
    def schedule(self) -> Schedule:
        """What the attention does in each step."""
        c, layers = self.config, self.weights.source.shape.num_layers
        return Schedule.of(self.method, self.attention, self.grid, c.policy, c.steps or 1, layers)

    @property
    def dense(self) -> DensePart:
        """What uses dense attention, whatever the method."""
        return self.schedule.dense

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """The steps that are run with dense attention too."""
        return measured_steps(self.config.measure_dense, self.dense)

    @property
    def remembered(self) -> Remembered:
        """What the attention remembers from step to step."""
        shape, item_bytes = self.weights.source.shape, self.weights.dtype.itemsize
        guidance = self.config.guidance_scale or 0.0
        return Remembered.of(self.method, self.attention, shape, self.grid, item_bytes, guidance, self.dense)

    def attention_flops(self, densities: Sequence[float | None] = ()) -> int:
        """FLOPs of self-attention in a forward pass, all layers, as the mean over the steps.

        Args:
            densities: the fraction of all query-key pairs that each layer attended exactly, where it was counted; it
                takes the place of the method's own estimate. Layers that always used dense attention do not count.
        """
        shape, schedule = self.weights.source.shape, self.schedule
        own, full = schedule.mean_flops(shape), dense_attention_flops(shape, self.num_tokens)
        counted = [density for density in densities if density is not None]
        if counted:
            bare = registry.get(self.config.attention)  # without exact rows
            estimate = schedule.mean(lambda config: bare.density(config, self.grid))
            own += round(full * (sum(counted) / len(counted) - estimate))
        return schedule.dense.mean(own, full)

    @property
    def loras(self) -> list[AskedLora]:
        """The LoRAs that change the video: those whose scale is not 0."""
        return [lora for lora in asked_loras(self.config.lora, self.config.lora_scale) if lora.scale]

    @property
    def method(self) -> Method:
        """The attention method that runs."""
        return with_delta(registry.get(self.config.attention), self.config.delta)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by option name, as it will be used."""
        c, weights = self.config, self.weights
        file = weights.source.weights or (None if self.method.family == "dense" else weights.sla_path)
        base = weights.trained_with or self.method.config()
        sparsity = getattr(self.attention, "sparsity", None)
        has_topk = "sla_topk" in self.method.option_names
        complement = None if sparsity is None or not has_topk else round(1 - sparsity, 12)
        sizes = [(name, getattr(self.attention, name, None)) for name in ("block_m", "block_n")]
        own = {name: value for name, value in c.attention_options if value != getattr(base, name, None)}
        fixed: dict[str, Any] = {
            "prompt": c.prompt,
            "negative_prompt": c.negative_prompt,
            "model": c.model or weights.source.name,
            "weights": None if file is None else str(file),
            "vae": c.vae,
            **(
                {"lora": [str(lora) for lora in self.loras], "lora_merge": not self.config.live_lora}
                if self.loras
                else {}
            ),
            "allow_untrained": c.allow_untrained,
            "attention": c.attention,
            "backend": c.backend,
            "sparsity": sparsity,
            "sla_topk": complement if c.sla_topk is None else c.sla_topk,
            **({"attention_options": own} if own else {}),
            # Only where they are not the weights' own, so that a batch goes on where it was begun without them.
            **{name: size for name, size in sizes if size != getattr(base, name, None) and size is not None},
            "size": f"{c.width}x{c.height}",
            "num_frames": c.num_frames,
            "fps": c.fps,
            "steps": c.steps,
            "guidance_scale": c.guidance_scale,
            "sampler": c.sampler,
            "flow_shift": None if c.sampler == "rcm" else c.flow_shift,
            "sigma_max": c.sigma_max if c.sampler == "rcm" else None,
            "ode": c.ode if c.sampler == "rcm" else None,
            "seed": c.seed,
            "num_videos": c.num_videos,
            "dtype": next(name for name, dtype in machine.DTYPES.items() if dtype == weights.dtype),
            "device": str(weights.device),
            "timing": c.timing,
            "output": c.output,
            "save_latents": c.save_latents,
            "overwrite": c.overwrite,
            **({} if self.picture is None else {"image": c.image, "image_sha256": self.picture.sha256}),
        }
        # What has come since counts only where it is not at its default, so that a batch begun without it goes on.
        return {
            **{name: value for name, value in changed(c).items() if name not in {*fixed, *RECORDED_OTHERWISE}},
            **fixed,
            **({} if c.crf is None else {"crf": c.crf}),
            **({"no_metadata": True} if c.no_metadata else {}),
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as a report and a video record them: None for the model's own weights and for a top-k that was
        not asked for (of 100 blocks a sparsity of 0.71 keeps 29, and a top-k of 0.29 keeps 28), and no full paths,
        which would fail on any other machine and reveal the user's name."""
        names = ("model", "weights", "vae", "output", *(["image"] if self.picture else []))
        paths = {name: report.shareable(getattr(self.config, name)) for name in names}
        name = paths["model"] or self.weights.source.name
        loras = [str(AskedLora(report.shareable(lora.path) or "", lora.scale)) for lora in self.loras]
        own = {"lora": loras} if loras else {}
        return {**self.settings, **paths, **own, "model": name, "sla_topk": self.config.sla_topk}


def find_weights(
    config: GenerateConfig, on_note: Callable[[str], None] = lambda text: None, *, transformer: bool = True
) -> Weights:
    """Find the model and the attention's weights that a config names, downloading what is not here.

    Args:
        on_note: called for downloads.
        transformer: False where only the other parts will run: the transformer's weights are not downloaded.
    Raises: SlagenError of some kind where they are not there, broken, or do not suit the attention asked for.
    """
    device = machine.pick_device(config.device)
    if config.offload not in ("auto", "none") and device.type != "cuda":
        raise EnvironmentProblem(
            f"--offload {config.offload} moves parts of the model to a GPU, but PyTorch {torch.__version__} sees none. "
            "Leave --offload out, or install a CUDA build of PyTorch."
        )
    dtype = machine.pick_dtype(config.dtype, device)
    notes: list[str] = []
    found = None if config.weights is None else look_at_weights(user_path(config.weights))
    source = resolve_model(
        config.model, device.type, own_transformer=transformer and (found is None or found.kind not in TRANSFORMERS),
        local_files_only=config.local_files_only, on_note=on_note,
    )  # fmt: skip
    if config.model is None and device.type != "cuda":
        notes.append(f"no CUDA device found: using the bundled model {source.name}; choose another with --model")
    if found is not None and found.kind in TRANSFORMERS:
        check_image_weights(source, user_path(config.weights or ""), found.kind)
        source = dataclasses.replace(source, weights=user_path(config.weights or ""))
        notes += found.notes
    trained_with, sla_path, sla_alone, distilled, layers = plan_attention(config, source, found)
    method = registry.get(config.attention)
    if method.family == "dense" and source.weights is not None:
        notes.append(f"dense attention uses the transformer weights in {source.weights.name}")
    elif found is not None and found.trained_with is not None and not suits(method, found.method):
        notes.append(f"{method.name} attention does not use the {label(found.method)} weights in {config.weights}")
    bundled = sla_path == bundled_folder() / SLA_FILE  # of that older kind: a new file would begin every batch anew
    if sla_path is not None and sla_alone and not bundled and read_metadata(sla_path).tensors is None:
        notes.append(
            f"{sla_path} was written by an older version of slagen and does not list its tensors, so changes to it "
            "go undetected"
        )
    few_steps = "" if found is None or distilled else found.few_steps
    loras = find_loras(config.lora, source.shape, source.name, takes_image=source.takes_image)
    return Weights(
        source,
        device,
        dtype,
        trained_with,
        sla_path,
        sla_alone,
        distilled,
        tuple(notes),
        few_steps,
        layers,
        loras,
    )


def make_plan(config: GenerateConfig, weights: Weights | None = None) -> Plan:
    """Fill in every default and check all that can be checked without reading weights. Raises SlagenError.

    Args:
        weights: as `find_weights` found them, where the caller has them already.
    """
    weights = weights or find_weights(config)
    source, method = weights.source, with_delta(registry.get(config.attention), config.delta)
    notes, warnings = list(weights.notes), list[str]()
    config, picture = with_image(config, source.name, source.takes_image, source.defaults, source.spatial_grid)
    asked, config = config, fill_defaults(config, source.defaults, weights.distilled, warnings)
    config = with_trained_layers(config, weights.layer_sparsities)
    if config.seed is None:
        config = dataclasses.replace(config, seed=secrets.randbelow(2**31))
    size = check_size(config, source.spatial_grid)
    if picture is not None and (small := picture.enlarged(*size[:2])) is not None:
        warnings.append(small)
    lora_notes, lora_warnings = describe_loras(weights.loras, asked_loras(config.lora, config.lora_scale))
    notes, warnings = notes + lora_notes, warnings + lora_warnings
    if (off_steps := steps_warning(config, weights)) is not None:
        warnings.append(off_steps)
    if unknown := source.defaults.unknown_words(config.prompt):
        warnings.append(source.defaults.unknown_words_warning(source.name, unknown))
    if (off_size := source.defaults.size_warning(source.name, *size)) is not None:
        warnings.append(off_size)
    grid = source.token_grid(*size)
    options = method.own(config.attention_settings)
    attention = method.configure(weights.trained_with or method.config(), options, grid)
    schedule = Schedule.of(method, attention, grid, config.policy, config.steps or 1, source.shape.num_layers)
    if weights.trained_with is not None and weights.sla_path is not None:
        warnings += schedule.differences(weights.trained_with, weights.layer_sparsities)
    if not schedule.applies:
        check_measured(config.measure_dense, schedule.dense, method.nothing_to_skip(grid.num_tokens))
        warnings.append(f"{method.nothing_to_skip(grid.num_tokens)}, so this clip uses dense attention")
        method = registry.get("dense")
        attention = method.config()
        config = config.with_dense_attention()
        schedule = Schedule.of(method, attention, grid, config.policy, config.steps or 1, source.shape.num_layers)
    else:
        notes += schedule.notes(options)
    check_measured(config.measure_dense, schedule.dense)
    notes += recommended_notes(asked, config)
    if asked.sparsity_schedule is None and config.sparsity_schedule is not None:
        notes.append("each layer has the sparsity that it was trained with; --sparsity gives one to all layers")
    if (dense_note := config.policy.note(grid.num_tokens, schedule.dense)) is not None:
        notes.append(dense_note)
    backend = None
    if method.family != "dense" or config.backend != "auto":
        backend = method.pick_backend(config.backend, source.head_dim, weights.device, weights.dtype, attention)
        notes.append(f"{label(method.name)} runs on the {backend} backend")
    made = Plan(config, weights, attention, grid, notes, warnings, backend, picture)
    notes += made.remembered.notes(method.name)
    return made
