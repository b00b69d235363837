"""SLA, or another attention that learns, in a Wan pipeline: install it fresh or with a file's weights, save, remove."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from slagen.attention import registry
from slagen.attention.learned import name_in_files, of_another, suits
from slagen.attention.protocol import Method
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import Branches
from slagen.attention.sla.method import SLA
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.model_files import SETTINGS_KEY, SLA_FILE
from slagen.formats.peek import lacks_settings, peek
from slagen.formats.side_file import SideFile
from slagen.formats.sla import (
    SLAMetadata,
    gaps,
    is_projection,
    read_sla,
    state_hash,
    weights_hash,
    write_sla,
)
from slagen.formats.sla_settings import check_layers
from slagen.formats.transformer import read_checkpoint
from slagen.io.forms import shown
from slagen.io.paths import user_path
from slagen.io.text import counted
from slagen.settings import no_argument
from slagen.wan.fill import fill
from slagen.wan.folder import is_hub_id
from slagen.wan.guards import refuse_adapters, refuse_offloaded, refuse_rounded
from slagen.wan.hub import fetch_sla
from slagen.wan.processor import (
    Installation,
    install_method,
    installation,
    processors,
    remove,
    set_layers,
    version_of,
)  # fmt: skip
from slagen.wan.saved import record_settings

UNTRAINED = (
    "SLA is installed without trained weights (proj_l is zero). The attention that its sparse branch skips is lost, "
    "so videos are poor. Load trained weights with slagen.load_sla, or train them with `slagen finetune --from-dense`. "
    "The sparse branch alone (branches='sparse') has no proj_l, but the model must be trained for it too."
)


def load_sla(
    pipe: Any,
    path: str | Path,
    *,
    config: SLAConfig | None = None,
    backend: Backend = "auto",
    branches: Branches = "both",
    allow_untrained: bool = False,
    other_blocks: bool = False,
    base_hash: str | None = None,
    local_files_only: bool = False,
) -> SLAMetadata:
    """Install SLA in a Wan pipeline with the weights of a file; `remove_sla` undoes it.

    Args:
        pipe: a WanPipeline, or its transformer. What slagen had installed in it before is removed first.
        path: an `sla.safetensors`, a folder with one, the folder that diffusers saved this very model in, with SLA
            inside, or a hub id, "owner/name", of a repository with an `sla.safetensors`.
        config: instead of the file's, for another sparsity; domain and feature map must be the file's.
        backend, branches: as in `sparse_linear_attention`.
        allow_untrained: accept layers whose `proj_l` is all zero.
        other_blocks: accept block sizes, and an order of tokens, that are not the file's.
        base_hash: `weights_hash` of the transformer, where the caller has it already.
        local_files_only: download nothing; a hub id must have been downloaded before.
    Returns: what the file says of itself.
    Raises: WeightsError, before anything is changed, if the file is broken, made for another base, does not hold the
        very tensors that it was written with, lacks a `proj_l`, or holds a tensor that the model has not, or in another
        shape, or with values that are not finite, or is of another attention method; UsageError if a LoRA is loaded or
        fused, hooks offload the transformer's layers, or its weights are quantised; EnvironmentProblem if the hub does
        not give the file.
    """
    _check_how(config, backend, branches)
    path = _fetched(path, local_files_only)
    return load_weights(
        pipe, path, registry.of_branches(branches), config=config, backend=backend, allow_untrained=allow_untrained,
        other_blocks=other_blocks, base_hash=base_hash,
    )  # fmt: skip


def load_weights(
    pipe: Any, path: str | Path, method: Method, *, config: Any = None, backend: str = "auto",
    allow_untrained: bool = False, other_blocks: bool = False, base_hash: str | None = None,
) -> SLAMetadata:  # fmt: skip
    """`load_sla` for any attention method, of a file on this machine.

    Args:
        config: of the method, instead of the file's. backend: one of the method's.
    """
    transformer = getattr(pipe, "transformer", pipe)
    metadata, tensors = _read_saved(Path(path)) or read_sla(path)
    if not suits(method, metadata.method):
        raise of_another(path, method, metadata.method)
    layers = metadata.layer_sparsities if config is None else None
    config = config or metadata.config
    _check_same_form(config, metadata.config, path, other_blocks)
    check_layers(path, metadata.layer_sparsities, transformer.config.num_layers)
    refuse_adapters(pipe, "loaded")
    refuse_offloaded(transformer, "loaded")
    if base_hash is None:
        refuse_rounded(transformer, "loaded")
    remove(transformer)
    found = base_hash or weights_hash(transformer)
    if found != metadata.base_hash:
        raise WeightsError(
            f"{path} was trained from {metadata.base_model} (weights hash {metadata.base_hash[:12]}), but this "
            f"model has the weights hash {found[:12]}. It is a different model, or has a LoRA fused into it. Give the "
            "model that the weights were trained from, or SLA weights for this one."
        )
    install_method(transformer, method, config, backend=backend)
    if layers is not None:
        set_layers(transformer, [dataclasses.replace(config, sparsity=sparsity) for sparsity in layers])
    missing = gaps(tensors, transformer.state_dict()) if metadata.tensors is None else []
    try:
        fill(transformer, tensors, path, allow_untrained, missing, metadata.layer_sparsities)
    except SlagenError:
        remove(transformer)
        raise
    _record(
        transformer, method, metadata.config, metadata.sampler_family, metadata.trained, metadata.layer_sparsities,
        Path(path),
    )  # fmt: skip
    record = installation(transformer)
    assert record is not None
    record.metadata = metadata
    return metadata


def _record(
    transformer: Any, method: Method, config: Any, family: str, trained: str, layers: tuple[float, ...] | None = None,
    path: Path | None = None,
) -> None:  # fmt: skip
    record_settings(transformer, name_in_files(method), config, family, trained, layers, path)


def _fetched(path: str | Path, local_files_only: bool) -> str | Path:
    """The path itself, or where the SLA file of a hub id is once it has been downloaded."""
    if is_hub_id(str(path)) and Path(path).suffix != ".safetensors" and not Path(path).exists():
        return fetch_sla(str(path), local_files_only=local_files_only, on_note=logging.getLogger("slagen").info)
    return path


def _read_saved(path: Path) -> tuple[SLAMetadata, dict[str, Tensor]] | None:
    """The attention weights inside a model that diffusers saved; None where a path names anything else."""
    if not path.is_dir() or (path / SLA_FILE).is_file() or not (path / "transformer").is_dir():
        return None
    found = peek(path)
    if found.lacks_settings:
        raise WeightsError(f"{path} {lacks_settings(found.method)}")
    if found.trained_with is None:
        return None
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    family = "rcm" if found.sampler == "rcm" else "flow"
    base = state_hash(checkpoint.tensors)
    metadata = SLAMetadata(
        found.trained_with, path.name, base, found.trained, 0, family, method=found.method,
        layer_sparsities=found.layer_sparsities,
    )  # fmt: skip
    return metadata, checkpoint.projections


def install_projections(
    pipe: Any,
    path: str | Path,
    config: Any,
    *,
    method: Method = SLA,
    backend: str = "auto",
    allow_untrained: bool = False,
) -> None:
    """Install attention with what a transformer's own file holds of it (of SLA `proj_l`), or SimpleTuner's side file.

    Raises: WeightsError if there is none, or it does not fit; the pipeline is as before then.
    """
    transformer = getattr(pipe, "transformer", pipe)
    found = read_checkpoint(Path(path), projections_only=True)
    if isinstance(found, Checkpoint):
        tensors = found.projections
    else:
        layers = range(transformer.config.num_layers)
        tensors = {f"blocks.{i}.attn1.processor.proj_l.{name}": x for i in layers for name, x in _pair(found)}
    about = peek(Path(path))
    install_method(transformer, method, config, backend=backend)
    try:
        fill(transformer, tensors, path, allow_untrained, [], about.layer_sparsities)
    except SlagenError:
        remove(transformer)
        raise
    _record(
        transformer, method, about.trained_with or config, "rcm" if about.sampler == "rcm" else "flow", about.trained,
        about.layer_sparsities,
    )  # fmt: skip


def _pair(side: SideFile) -> list[tuple[str, Tensor]]:
    return [("weight", side.weight), ("bias", side.bias)]


def save_sla(
    pipe: Any, path: str | Path, metadata: SLAMetadata | None = None, base: dict[str, Tensor] | None = None
) -> Path:
    """Write the SLA weights of a pipeline: every `proj_l`, and every tensor that differs from the base.

    Those of another attention method too: what it learned, and every tensor that differs.

    Args:
        pipe: a WanPipeline with SLA installed, or its transformer.
        path: a file, or a folder that gets `sla.safetensors`.
        metadata: what the file will say of itself; None is what `load_sla` read, and after `apply_sla` what it was
            called with.
        base: the base's transformer tensors by name; None means that only `proj_l` and what `load_sla` put aside
            can differ from it. Give the base if more than `proj_l` was trained.
    Returns: the file's path.
    Raises: UsageError if no SLA is installed, the base is not the one that the metadata names, or is not given and was
        trained, a LoRA is loaded or fused, or hooks offload the transformer's layers.
    """
    transformer = getattr(pipe, "transformer", pipe)
    refuse_adapters(pipe, "saved")
    refuse_offloaded(transformer, "saved")
    record = installation(transformer)
    state = transformer.state_dict()
    if record is None or processors(transformer)[0].method.family == "dense":
        raise UsageError("this pipeline has no SLA installed, so there is nothing to save. Call apply_sla() first.")
    metadata = metadata or record.metadata
    if base is None:
        if metadata is None:  # otherwise its hash shows it
            _refuse_trained(record, state)
        base = {name: record.replaced.get(name, tensor) for name, tensor in state.items() if not is_projection(name)}
    found = state_hash(base)
    if metadata is not None and found != metadata.base_hash:
        raise UsageError(
            f"the hash of the base's weights is not metadata.base_hash ({metadata.base_hash[:12]}), so what training "
            "changed cannot be computed from them. Give the tensors from before training as base."
        )
    kept = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if is_projection(name) or (name in base and not torch.equal(tensor.cpu(), base[name].to(tensor.dtype)))
    }
    if metadata is None:
        metadata = _made_here(pipe, found, "all" if not kept or not all(map(is_projection, kept)) else None)
    file = user_path(path)
    if file.suffix != ".safetensors":
        file = file / SLA_FILE
    write_sla(kept, file, metadata)
    return file


def _refuse_trained(record: Installation, state: dict[str, Tensor]) -> None:
    """Raise UsageError where tensors of the model, which are to be taken for the base, were changed since the attention
    was installed: nobody could load a file that names them as its base."""
    changed = [name for name, version in record.versions.items() if name in state and version_of(state[name]) > version]
    if changed:
        raise UsageError(
            f"{counted(len(changed), 'tensor')} of the model changed since the attention was installed, such as "
            f"{changed[0]}, and their original values are unknown. Give the tensors from before training as base."
        )


def _made_here(pipe: Any, base_hash: str, trained: str | None) -> SLAMetadata:
    """What a file says of attention that was installed here; `trained` is None for what it learned alone."""
    transformer = getattr(pipe, "transformer", pipe)
    saved = transformer.config.get(SETTINGS_KEY) or {}
    origin = Path(str(getattr(pipe, "name_or_path", None) or transformer.config.get("_name_or_path") or ""))
    name = (origin.parent if origin.name == "transformer" else origin).name or type(transformer).__name__
    processor = processors(transformer)[0]
    trained = trained or " and ".join(group.name for group in processor.method.parameters)
    return SLAMetadata(
        processor.config, name, base_hash, saved.get("trained") or trained, 0, saved.get("sampler_family", "flow"),
        method=name_in_files(processor.method),
    )  # fmt: skip


def apply_sla(
    pipe: Any,
    config: SLAConfig | None = None,
    *,
    backend: Backend = "auto",
    branches: Branches = "both",
    **settings: Any,
) -> None:
    """Install SLA with an untrained (zero) `proj_l` in a Wan pipeline: sparse attention, until it is fine-tuned.

    A UserWarning says so, but for `branches="sparse"`, which needs no training.

    Args:
        pipe: a WanPipeline, or its transformer, without SLA in it.
        config: how to divide the work; None is `SLAConfig()`.
        backend, branches: as in `sparse_linear_attention`.
        settings: fields of SLAConfig that differ from `config`, such as `sparsity=0.9`.
    Raises: UsageError if SLA is installed already, the model is not a Wan transformer, hooks offload its layers, or a
        setting cannot work; TypeError for one that there is not.
    """
    _check_how(config, backend, branches)
    fields = SLAConfig.__dataclass_fields__
    for name in settings.keys() - fields.keys():
        reason = f". Give sparsity, which is 1 - {name}." if name in ("topk", "sla_topk", "topk_ratio") else ""
        raise no_argument("apply_sla", name, [*fields, "config", "backend", "branches"], reason=reason)
    method = registry.of_branches(branches)
    install_untrained(pipe, dataclasses.replace(config or SLAConfig(), **settings), backend, method)
    if branches != "sparse":
        warnings.warn(UNTRAINED, stacklevel=2)


def install_untrained(pipe: Any, config: Any, backend: str = "auto", method: Method = SLA) -> None:
    """`apply_sla` of any method, for callers that say themselves, or know, that it is untrained."""
    transformer = getattr(pipe, "transformer", pipe)
    install_method(transformer, method, config, backend=backend)
    _record(transformer, method, config, "flow", "" if name_in_files(method) == method.name else method.name)


def remove_sla(pipe: Any) -> None:
    """Take SLA out of a Wan pipeline and put the base weights and processors back. Without SLA, do nothing."""
    remove(getattr(pipe, "transformer", pipe))


def _check_how(config: object, backend: str, branches: str) -> None:
    """Raise UsageError for arguments that are no config, backend or choice of branches."""
    if config is not None and not isinstance(config, SLAConfig):
        raise UsageError(f"config is {shown(config)}, but must be an SLAConfig. Try slagen.SLAConfig(sparsity=0.95).")
    if branches not in get_args(Branches):
        raise UsageError(f"branches is {shown(branches)}, but must be one of {', '.join(get_args(Branches))}.")
    registry.of_branches(branches).check_backend(backend)


def _check_same_form(config: Any, trained: Any, path: str | Path, other_blocks: bool) -> None:
    for name in ("linear_domain", "feature_map", *(() if other_blocks else ("block_m", "block_n", "order"))):
        if getattr(config, name, None) != getattr(trained, name, None):
            raise WeightsError(
                f"{name} is {getattr(config, name)!r}, but {path} was trained with {getattr(trained, name)!r}, and its "
                "weights work only with the value from training. Leave the setting out."
            )
