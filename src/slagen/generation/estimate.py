"""plan(GenerateConfig) -> what a run will be: tokens, blocks, FLOPs, memory, downloads, names. No torch, no network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.attention import cost, registry
from slagen.attention.cost import ModelShape
from slagen.attention.delta.method import with_delta
from slagen.attention.learned import SLA_NAME, label, of_another, suits
from slagen.attention.policy import DensePart, Remembered
from slagen.attention.protocol import Grid, Method
from slagen.attention.schedule import Schedule
from slagen.errors import UsageError
from slagen.formats.headers import read_header, read_strings
from slagen.formats.held import transformer_files
from slagen.formats.model_files import SETTINGS_KEY, SLA_FILE
from slagen.formats.names import is_untuned
from slagen.formats.sla_settings import read_trained_with
from slagen.generation import memory
from slagen.generation.config import GenerateConfig
from slagen.generation.fill_defaults import (
    check_size,
    fill_defaults,
    recommended_notes,
    with_image,
    with_trained_layers,
)
from slagen.generation.planned_memory import (
    IMAGE_ENCODER_PARAMETERS,
    TEXT_ENCODER_PARAMETERS,
    VAE_PARAMETERS,
    PlannedMemory,
    transformer_parameters,
)
from slagen.generation.preflight import check_run
from slagen.generation.run_estimate import (
    Download,
    Flops,
    ListedModel,
    RunEstimate,
    TotalFlops,
)  # fmt: skip
from slagen.io.paths import is_video, user_path
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import BUNDLED, ModelSource, bundled_folder, describe_folder, token_grid
from slagen.wan.presets import CUDA_DEFAULT, PRESETS, Preset, local_folder, never_tuned

GIB = 2**30
NO_PROMPT = "prompt"  # where only the rest of a run is planned


@dataclass(frozen=True)
class _Model:
    """What is known of a model without its weights.

    Args:
        preset: itself, or one made from a folder. name: as `generate` shows it.
        trained: the config that its attention weights were trained with; None without any, and where only the
            tensors show it. method: the one that they belong to. layers: the sparsity of each, as in SLAMetadata.
        source: None where it is not on this machine. weights: the transformer file that is used instead of its own.
    """

    preset: Preset
    name: str
    trained: Any
    method: str = SLA_NAME
    source: ModelSource | None = None
    layers: tuple[float, ...] | None = None
    weights: Path | None = None

    @property
    def defaults(self) -> ModelDefaults:
        """Its own settings."""
        return self.preset.defaults

    def size(self, config: GenerateConfig) -> tuple[tuple[int, int, int], Grid]:
        """Width, height and frames of a filled config, and its tokens. Raises UsageError as `check_grid`."""
        size = check_size(config, self.spatial_grid)
        return size, token_grid(*size) if self.source is None else self.source.token_grid(*size)

    @property
    def spatial_grid(self) -> int:
        """Width and height of its tokens, in pixels."""
        return 16 if self.source is None else self.source.spatial_grid

    @property
    def folder(self) -> Path | None:
        """Where it lies."""
        return None if self.source is None else self.source.folder

    @property
    def shape(self) -> ModelShape:
        """Its transformer's sizes."""
        return self.preset.shape


def plan(config: GenerateConfig, device: str | None = None) -> RunEstimate:
    """Say what `slagen generate` with these settings will do, from sizes alone.

    Args:
        config: a model that is None is the default of the device, or the bundled one.
        device: the kind it will run on; None: the config's. Where that is auto it is not known, but is the CPU for the
            bundled model where there is no card.
    Returns: the estimate. With dense attention every key block is kept, and the FLOPs of SLA are given for comparison.
    Raises: UsageError for an unknown model or impossible sizes, WeightsError for a folder that is no model.
    """
    check_run(config)
    config, device = _placed(config, device)
    model = _model(config)
    notes = list[str]()
    config, _ = with_image(config, model.name, model.preset.takes_image, model.defaults, model.spatial_grid)
    asked, config = config, fill_defaults(config, model.defaults, _distilled(config, model.defaults), notes)
    size, grid = model.size(config)
    tokens = grid.num_tokens
    method = registry.get(config.attention)
    is_dense = method.family == "dense"
    # What SLA would take is said beside dense attention.
    method = registry.get("sla") if is_dense else with_delta(method, config.delta)
    base = model.trained if model.trained is not None and suits(method, model.method) else method.config()
    config = with_trained_layers(config, model.layers if not is_dense and suits(method, model.method) else None)
    attention = method.configure(base, method.own(config.attention_settings), grid)
    schedule = Schedule.of(method, attention, grid, config.policy, config.steps or 1, model.shape.num_layers)
    about = schedule.describe()
    notes = _notes(config, model, None if is_dense else method, schedule, size) + notes
    part = schedule.dense
    item_bytes, guidance = 4 if config.dtype == "fp32" else 2, config.guidance_scale or 0.0
    kept = Remembered.of(method, attention, model.shape, grid, item_bytes, guidance, part)
    takes = PlannedMemory(config, model.preset, model.source, model.weights, tokens, size, kept.num_bytes)
    notes += takes.notes(device)
    notes += [config.policy.note(tokens, part) or ""] * (part.share > 0 and schedule.applies)
    notes += kept.notes(method.name) + recommended_notes(asked, config)
    flops = _flops(model, schedule)
    passes = (config.steps or 0) * (2 if (config.guidance_scale or 0) > 1 else 1)
    return RunEstimate(
        model=model.preset.name,
        settings=_settings(config, size, about, is_dense, part),
        trained_sparsity=getattr(model.trained, "sparsity", None),
        tokens=tokens,
        query_blocks=about.get("query_blocks"),
        key_blocks=about.get("key_blocks"),
        tail_tokens=_tail(about, tokens),
        topk_blocks=about.get("key_blocks" if is_dense else "critical"),
        kept_fraction=1.0 if is_dense else part.share + (1 - part.share) * schedule.mean_density,
        flops=flops,
        flops_of=method.name,
        flops_speedup=flops.dense_forward / flops.sla_forward,
        amdahl_ceiling=flops.dense_forward / flops.other,
        forward_passes=passes,
        total_flops=TotalFlops(passes * flops.dense_forward, passes * flops.sla_forward),
        device=device,
        memory_gib=takes.to_run_memory(),
        downloads=_downloads(model.preset),
        outputs=_outputs(asked),
        notes=notes,
        **schedule.planned(model.shape),
    )  # fmt: skip


def _settings(
    config: GenerateConfig, size: tuple[int, int, int], about: dict[str, Any], is_dense: bool, part: DensePart
) -> dict[str, Any]:
    """The settings that an estimate is for, every default filled in."""
    return {
        "width": size[0], "height": size[1], "num_frames": size[2], "fps": config.fps, "steps": config.steps,
        "guidance_scale": config.guidance_scale, "sampler": config.sampler, "attention": config.attention,
        "sparsity": None if is_dense else about.get("sparsity"), "sla_topk": config.sla_topk,
        **{name: about.get(name) for name in ("block_m", "block_n", "linear_domain", "feature_map")},
        **dict(config.attention_options), **part.to_dict(),
        **{name: x for name in ("delta", "sparsity_schedule") if (x := getattr(config, name)) is not None},
    }  # fmt: skip


def _placed(config: GenerateConfig, device: str | None) -> tuple[GenerateConfig, str | None]:
    """The config with the model of the device, and the kind of device it will run on, None where that is not known."""
    if device is None and config.device != "auto":
        device = config.device.partition(":")[0]
    if device == "cuda" and config.model is None:
        config = dataclasses.replace(config, model=CUDA_DEFAULT)
    if device is None and config.model in (None, BUNDLED) and not memory.has_card():
        device = "cpu"
    return config, device


def _flops(model: _Model, schedule: Schedule) -> Flops:
    """FLOPs of a forward pass, with the method, on average over the steps, and with dense attention."""
    shape = dataclasses.replace(model.shape, text_tokens=model.defaults.max_sequence_length)
    tokens = schedule.grid.num_tokens
    dense, other = cost.dense_attention_flops(shape, tokens), cost.other_flops(shape, tokens)
    own = schedule.dense.mean(schedule.mean_flops(shape), dense)
    return Flops(dense + other, own + other, dense, own, other)


def _tail(about: dict[str, Any], tokens: int) -> int | None:
    """The tokens in the last key block, 0 where it is whole; None where blocks are not cut from the sequence."""
    block = about.get("block_n")
    return None if block is None or about["key_blocks"] != -(-tokens // block) else tokens % block


def _notes(
    config: GenerateConfig,
    model: _Model,
    method: Method | None,
    schedule: Schedule,
    size: tuple[int, int, int],
) -> list[str]:
    """What looks wrong; `method` is None where dense attention runs.

    Raises: WeightsError for weights that were never tuned for SLA, and LoRAs of another model, where headers show it.
    """
    defaults, notes = model.defaults, schedule.notes({}) if schedule.by_step is not None else []
    if config.lora:
        from slagen.generation.lora_files import lora_notes  # with torch

        notes = lora_notes(config, model.shape, model.name, model.preset.takes_image) + notes
    if method is None:
        notes.append("this run uses dense attention; the cost of SLA is shown for comparison")
    elif model.trained is not None and suits(method, model.method):
        notes += schedule.differences(model.trained, model.layers)
    elif method.needs.weights:
        if not config.allow_untrained and _is_untuned(model.folder if config.weights is None else config.weights):
            raise never_tuned(model.name, method)
        if model.trained is not None and not config.allow_untrained:
            raise of_another(config.weights or model.name, method, model.method)
        if config.weights is None:
            tuned = f"these weights were not fine-tuned for {label(method.name)}"
            notes.append(
                f"{tuned}, so the video will be poor" if config.allow_untrained else
                f"{tuned}; slagen generate needs other weights, given with --weights, or --allow-untrained"
            )  # fmt: skip
    elif schedule.by_step is None and schedule.applies:
        notes += schedule.notes(method.own(config.attention_settings))
    if config.cache is not None:
        notes.append("what the cache skips is not known before the run, so FLOPs and time are those of all blocks")
    if method is not None and not schedule.applies:
        notes.append(f"{schedule.method.nothing_to_skip(schedule.grid.num_tokens)}, so this clip uses dense attention")
    unknown = defaults.unknown_words(config.prompt) if config.prompt != NO_PROMPT else []
    if unknown:
        notes.append(defaults.unknown_words_warning(model.name, unknown))
    if (off_size := defaults.size_warning(model.name, *size)) is not None:
        notes.append(off_size)
    if size[2] > 81 and model.preset.base is not None:
        notes.append(f"this video has {size[2]} frames, but Wan2.1 was trained on 81; longer videos look worse")
    return notes


def _distilled(config: GenerateConfig, defaults: ModelDefaults) -> bool:
    """Whether weights are distilled for rcm; if only their tensors show it, what is asked for is taken at its word."""
    asked = (config.sampler or defaults.sampler) == "rcm"
    if config.weights is None:
        return defaults.sampler == "rcm"
    file = user_path(config.weights)
    file = file / SLA_FILE if file.is_dir() else file
    if file.suffix != ".safetensors" or not file.is_file():
        return asked
    about = read_header(file).get("__metadata__", {}).get("slagen")
    return (
        asked if about is None else read_strings(file, about, {"sampler_family?": str}).get("sampler_family") == "rcm"
    )


def _is_untuned(place: Path | str | None) -> bool:
    """Whether the headers of a weight file or a folder show a transformer, and no SLA weights in it or beside it."""
    if place is None or (user_path(place) / SLA_FILE).is_file():
        return False
    place = user_path(place)
    inner = place / "transformer" if (place / "transformer").is_dir() else place
    names = set[str]()
    for file in sorted(inner.glob("*.safetensors")) if inner.is_dir() else [inner]:
        header = read_header(file) if file.suffix == ".safetensors" else {}
        if SETTINGS_KEY in header.pop("__metadata__", {}):
            return False
        names |= header.keys()
    return is_untuned(names)


def _model(config: GenerateConfig) -> _Model:
    """Find what a config names. Raises UsageError for an unknown model, WeightsError for a folder that is none."""
    name = config.model or BUNDLED
    preset = PRESETS.get(name)
    weights = None if config.weights is None else user_path(config.weights)
    found, whole = None, weights if weights is not None and transformer_files(weights) else None
    if weights is not None:
        file = weights / SLA_FILE if (weights / SLA_FILE).is_file() else weights
        known = file.suffix == ".safetensors" and file.is_file()
        found = read_trained_with(file) if known or (file / "transformer" / "config.json").is_file() else None
    if preset is not None:
        method, trained, layers = found or (SLA_NAME, preset.sla, None)
        return _Model(preset, preset.name, trained, method, layers=layers, weights=whole)
    folder = local_folder(name)
    if folder is None:
        raise UsageError(
            f"{name} is not a folder on this machine, and slagen plan cannot read a Hugging Face model that is not "
            f"downloaded. With --model, give a folder or one of {', '.join([BUNDLED, *PRESETS])}."
        )
    source = describe_folder(folder, name)
    if found is None and weights is None:
        found = read_trained_with(folder / SLA_FILE if (folder / SLA_FILE).is_file() else folder)
    method, trained, layers = found or (SLA_NAME, None, None)
    preset = Preset(name, "", None, None, source.shape, source.defaults, takes_image=source.takes_image)
    source = dataclasses.replace(source, weights=whole)
    return _Model(preset, folder.resolve().name, trained, method, source, layers, whole)


def _downloads(preset: Preset) -> list[Download]:
    """What a first run fetches, by parameters; the hub is asked for the true sizes then."""
    if preset.base is None:
        return []
    transformer = 2 * transformer_parameters(preset.shape, takes_image=preset.takes_image)
    shared = 2 * TEXT_ENCODER_PARAMETERS + 4 * VAE_PARAMETERS
    shared += 4 * IMAGE_ENCODER_PARAMETERS if preset.takes_image else 0
    base = shared + (0 if preset.weights else transformer)
    rows = [Download(preset.base, base / GIB)]
    if preset.weights is not None:
        rows.append(Download(preset.weights, transformer / GIB))
    return rows


def _outputs(config: GenerateConfig) -> list[str]:
    """File names; <hash> stands for eight digits that depend on the machine's device and dtype too."""
    output = Path(config.output)
    if is_video(config.output):
        return [str(output)]
    seeds = ["<seed>"] * config.num_videos
    if config.seed is not None:
        seeds = [str(config.seed + i) for i in range(config.num_videos)]
    names = [f"{i + 1:04d}-{config.slug}-s{seed}-<hash>.mp4" for i, seed in enumerate(seeds)]
    return [str(output / name) for name in names]


def models() -> list[ListedModel]:
    """Every preset, as `slagen models` lists it."""
    folder = bundled_folder()
    source = describe_folder(folder, BUNDLED)
    trained = read_trained_with(folder / SLA_FILE) if (folder / SLA_FILE).is_file() else None
    own = None if trained is None else trained.config
    bundled = Preset(BUNDLED, "bundled; draws circles, squares, triangles and stars", None, None, source.shape,
                     source.defaults, own)  # fmt: skip
    return [ListedModel.of(preset) for preset in (bundled, *PRESETS.values())]
