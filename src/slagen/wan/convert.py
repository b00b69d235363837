"""convert, merge and info: weight files of any public form -> a folder that slagen and diffusers read, or words."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slagen.attention.cost import ModelShape
from slagen.config import ModelDefaults
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.bounds import is_finite
from slagen.formats.kinds import REFUSALS, identify
from slagen.formats.model_files import SLA_FILE, read_header, read_json
from slagen.formats.names import transformers
from slagen.formats.published import preset_of_width
from slagen.formats.reading import gguf_kinds, read_tensors
from slagen.formats.transformer import (
    SETTINGS_METADATA,
    UNTOLD,
    Checkpoint,
    Found,
    SideFile,
    check_fit,
    peek,
    read_checkpoint,
)
from slagen.io.files import file_hash, reserved, write_json, writing
from slagen.io.paths import check_folder, check_utf8, user_path
from slagen.io.text import counted, quote
from slagen.wan.install import SLAMetadata, read_metadata, save_sla, weights_hash
from slagen.wan.loading import build_transformer, load_vae, wan_config
from slagen.wan.presets import (
    BUNDLED,
    WAN_1_3B,
    ModelSource,
    bundled_folder,
    describe_folder,
)
from slagen.wan.processor import install

PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")
MAX_SHARD = "5GB"
MODEL_FILES = {"model_index.json", "config.json", "transformer"}  # one of them is in every folder that convert makes


def convert(
    source: str, output: str, *, base: str | None = None, dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False, part: str | None = None, on_note: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Write a transformer of any public form as a diffusers folder, with its SLA weights in `sla.safetensors`.

    Args:
        source: the transformer's file or folder, or the original VAE's file.
        output: the folder to make; it appears whole or not at all.
        base: a diffusers pipeline's folder, whose other parts are copied so that the result is a whole model; None
            writes the transformer alone, for `--weights`.
        dtype: of the transformer's weights, but for what diffusers keeps in float32.
        part: which transformer, of a file that holds several.
    Raises: WeightsError if anything in the file is left over, missing or misshapen; UsageError if `output` exists.
    """
    check_folder("output", output)
    path, target = user_path(source), user_path(output)
    check_utf8(target)
    folder = None if base is None else describe_base(base)
    _check_free(target, overwrite, [path] if folder is None else [path, folder.folder])
    with reserved(target):
        _check_free(target, overwrite, [])  # it may have been made since
        is_vae = not path.is_dir() and identify(read_tensors(path)) == "vae"
        try:
            with writing(target, replace=overwrite) as half:
                if is_vae:
                    _convert_vae(path, half, folder)
                else:
                    _convert_transformer(path, half, folder, dtype, part, on_note)
        except (OSError, SafetensorError) as error:
            raise SlagenError(f"{target} cannot be written ({error}). Check the free space there.") from error
    return target


def describe_base(base: str) -> ModelSource:
    """A pipeline's folder to take parts from: a folder, or the bundled model."""
    if base == BUNDLED:
        return describe_folder(bundled_folder(), BUNDLED)
    path = user_path(base)
    if not path.exists():
        raise UsageError(
            f"--model is {quote(base)}, but convert needs a folder on this machine. Give one, or leave it out."
        )
    return describe_folder(path, path.resolve().name)


def _check_free(target: Path, overwrite: bool, read: list[Path]) -> None:
    """Raise UsageError where a folder may not be written: what is replaced is a model, and nothing that is read."""
    content = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if (content and not overwrite) or (os.path.lexists(target) and not target.is_dir()):
        raise UsageError(f"{target} exists. Choose another output, or replace a folder with --overwrite.")
    if content and not content & MODEL_FILES:
        raise UsageError(f"{target} is no model's folder, so nothing in it is replaced. Choose another output.")
    for path in read:
        if path.resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{path} is read, but lies in {target}, which would be replaced. Choose another output.")


def _convert_vae(path: Path, part: Path, folder: ModelSource | None) -> None:
    load_vae(path, None if folder is None else folder.folder / "vae").save_pretrained(part)


def _convert_transformer(
    path: Path, target: Path, folder: ModelSource | None, dtype: torch.dtype, part: str | None,
    on_note: Callable[[str], None],
) -> None:  # fmt: skip
    if path.suffix == ".gguf":
        raise UsageError(f"{path} is GGUF, which is to be run as it is: generate --weights {path}.")
    found = peek(path, part)
    if found.untold:
        raise WeightsError(f"{path} {UNTOLD}")
    checkpoint = read_checkpoint(path, dtype, part=part) if found.kind == "transformer" else None
    if not isinstance(checkpoint, Checkpoint):
        raise UsageError(
            f"{path} holds SLA weights alone. Use it beside its model: generate --model MODEL --weights {path}."
        )
    for note in found.notes:
        on_note(note)
    config = _config_for(checkpoint, folder)
    model = build_transformer(checkpoint, config, dtype)
    layers = len(checkpoint.projections) // 2
    on_note(
        f"{checkpoint.layout} names, {counted(len(checkpoint.tensors), 'tensor')}, SLA in {counted(layers, 'layer')}: "
        "all used"
    )
    model.save_pretrained(target / "transformer", max_shard_size=MAX_SHARD)
    distilled = found.sampler == "rcm"
    if found.sla is not None:
        name = folder.name if folder is not None else preset_of_width(checkpoint.width) or "wan2.1"
        metadata = SLAMetadata(
            found.sla,
            name,
            weights_hash(model),
            trained=found.trained or "all",
            steps=0,
            sampler_family="rcm" if distilled else "flow",
            source_hash=_digest(path),
        )
        install(model, found.sla)
        state = model.state_dict()
        with torch.no_grad():
            for key, tensor in checkpoint.projections.items():
                state[key].copy_(tensor)
        save_sla(model, target / SLA_FILE, metadata)
    if folder is not None:
        shutil.copy(folder.folder / "model_index.json", target)
        for component in PARTS:
            if (folder.folder / component).is_dir():
                shutil.copytree(folder.folder / component, target / component, copy_function=_link_or_copy)
        write_json(target / "slagen.json", _defaults(folder.defaults, distilled))


def _link_or_copy(source: str, target: str) -> None:
    """A hard link costs no space; another disk needs a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _defaults(base: ModelDefaults, distilled: bool) -> dict[str, Any]:
    """The model's own settings as slagen.json holds them."""
    fields = dataclasses.asdict(base)
    if distilled:
        fields |= {"sampler": "rcm", "steps": 4, "guidance_scale": 1.0, "negative_prompt": ""}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if value is not None
    }


def _config_for(checkpoint: Checkpoint, folder: ModelSource | None) -> dict[str, Any]:
    """The transformer's config: the base's, or one read off the tensors' shapes."""
    if folder is not None:
        return read_json(folder.folder / "transformer" / "config.json", folder.folder)
    tensors, width = checkpoint.tensors, checkpoint.width
    weights = [x for name, x in checkpoint.projections.items() if name.endswith("weight")]
    head_dim = weights[0].shape[0] if weights else WAN_1_3B.head_dim
    try:
        ffn_dim = tensors["blocks.0.ffn.net.0.proj.bias"].shape[0]
        sizes = {
            "text_dim": tensors["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": tensors["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "in_channels": tensors["patch_embedding.weight"][0].numel() // 4,
            "out_channels": tensors["proj_out.bias"].shape[0] // 4,
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{checkpoint.path} lacks {error}, so it is no whole transformer. Get it again.") from error
    if not width or width % head_dim:
        raise WeightsError(
            f"{checkpoint.path} has layers of width {width}, which are no heads of {head_dim}. Give the pipeline that "
            "it belongs to with --model."
        )
    shape = ModelShape(checkpoint.num_layers, width // head_dim, head_dim, ffn_dim, 512)
    return {**wan_config(shape), **sizes}


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in order."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


def merge(
    base: str, output: str, *, diff_base: str, diff_target: str, weight: float = 1.0, overwrite: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Add what a tuning changed to another model: W = W_base + w (W_target - W_diffbase), tensor by tensor in float32.

    Args:
        base: transformer that gets the change, such as a step-distilled one.
        output: a .safetensors file, in diffusers' names, in the base's dtypes.
        diff_base, diff_target: the transformer before and after tuning. What only the target has (`proj_l`) is copied;
            what either lacks, or has in another shape, stays the base's.
        weight: w.
    Raises: WeightsError if a file is no transformer; UsageError for an output that exists, or a weight that is not
        finite or takes a sum beyond its dtype.
    Source: TurboDiffusion's merge script, github.com/thu-ml/TurboDiffusion.
    """
    if not math.isfinite(weight):
        raise UsageError(f"weight is {weight}, but must be a finite number. Try --weight 1.")
    target = user_path(output)
    check_utf8(target)
    if target.suffix != ".safetensors":
        raise UsageError(
            f"the output is {target}, but must be a .safetensors file. Try {target.with_suffix('.safetensors')}."
        )
    with reserved(target):
        if target.is_dir() or (os.path.lexists(target) and not overwrite):
            raise UsageError(f"{target} exists. Choose another output, or replace a file with --overwrite.")
        tensors, told = _merged(base, diff_base, diff_target, weight, on_note)
        try:
            with writing(target, replace=overwrite) as part:
                save_file(tensors, part, metadata=told)
        except (OSError, SafetensorError) as error:
            raise SlagenError(f"{target} cannot be written ({error}). Check the free space there.") from error
    return target


def _merged(
    base: str, diff_base: str, diff_target: str, weight: float, on_note: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The merged tensors, and the metadata that tell what their SLA weights were trained with."""
    paths = [user_path(name) for name in (base, diff_base, diff_target)]
    start, before, after = ({**c.tensors, **c.projections} for c in map(_whole, paths))
    told = _settings_of(peek(paths[0]), peek(paths[2]))
    merged: dict[str, Tensor] = {}
    kept = []
    for name, tensor in start.items():
        old, new = before.get(name), after.get(name)
        if old is None or new is None or not old.shape == new.shape == tensor.shape:
            merged[name] = tensor
            kept.append(name)
            continue
        merged[name] = (tensor.float() + weight * (new.float() - old.float())).to(tensor.dtype)
        if not is_finite(merged[name]):
            raise UsageError(f"with a weight of {weight:g} {name} is beyond {tensor.dtype}. Try --weight 1.")
    copied = [name for name in after if name not in start]
    merged |= {name: after[name] for name in copied}
    on_note(
        f"{counted(len(start) - len(kept), 'tensor')} changed, {len(kept)} kept as in the base, "
        f"{len(copied)} only the target's"
    )
    return {name: tensor.contiguous() for name, tensor in merged.items()}, told


def _settings_of(base: Found, target: Found) -> dict[str, str] | None:
    """The metadata that tell what a merged transformer's SLA weights were trained with; None where it has none."""
    found = target if target.sla is not None else base
    if found.sla is None:
        return None
    family = "rcm" if "rcm" in (base.sampler, target.sampler) else "flow"
    settings = {"config": found.sla.to_dict(), "sampler_family": family, "trained": found.trained}
    return {SETTINGS_METADATA: json.dumps(settings, sort_keys=True)}


def _whole(path: Path) -> Checkpoint:
    """A transformer that is whole in itself: as many tensors in every layer, none of them strange."""
    checkpoint = read_checkpoint(path, torch.float32)
    if not isinstance(checkpoint, Checkpoint):
        raise WeightsError(f"{path} holds SLA weights alone. Give a whole transformer.")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    roles = {re.sub(r"^blocks\.\d+\.", "", name) for name in shapes if name.startswith("blocks.")}
    for layer in range(checkpoint.num_layers):
        for role in roles:
            shapes.setdefault(f"blocks.{layer}.{role}", torch.Size())
    weights = [x for name, x in checkpoint.projections.items() if name.endswith("weight")]
    check_fit(checkpoint, shapes, checkpoint.num_layers, weights[0].shape[0] if weights else 0)
    return checkpoint


def info(path_text: str) -> dict[str, Any]:
    """Say what a weight file or folder is: its form, sizes and dtypes, and the norm of every layer's `proj_l`.

    Raises: WeightsError if it is broken, or nothing that slagen knows.
    """
    path = user_path(path_text)
    if path.is_dir() and (path / "model_index.json").is_file():
        return _describe_pipeline(path)
    if path.is_dir() and not (path / "transformer").is_dir() and (path / SLA_FILE).is_file():
        path = path / SLA_FILE
    content = read_tensors(path)
    kind = identify(content)
    if path.suffix == ".safetensors" and "slagen" in read_header(path).get("__metadata__", {}):
        kind = "sla"  # which may hold every tensor of a transformer, and low-rank changes
    about: dict[str, Any] = {"path": str(path), "kind": kind}
    tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)}
    dtypes = [str(x.dtype).removeprefix("torch.") for x in tensors.values()]
    dtypes = gguf_kinds(path) if path.suffix == ".gguf" else dtypes
    about |= {
        "tensors": len(tensors), "parameters": sum(x.numel() for x in tensors.values()),
        "dtypes": dict(Counter(dtypes)),
    }  # fmt: skip
    if kind == "sla":
        return about | _describe_sla(path, tensors)
    if kind == "side-file":
        side = read_checkpoint(path)
        assert isinstance(side, SideFile)
        norms = [side.weight.norm().item()]
        return about | {"trained_with": side.config.to_dict(), "proj_l_norms": norms, "trained": norms[0] > 0}
    if kind != "transformer":
        return about | {"meaning": f"this {REFUSALS[kind]}"}
    parts = list(transformers(content))
    if len(parts) > 1:
        return about | {"parts": parts}
    about |= _describe_transformer(path, not FLOAT_KINDS.issuperset(dtypes))
    if (path / SLA_FILE).is_file():
        about["sla_file"] = info(str(path / SLA_FILE))
    return about


FLOAT_KINDS = {"float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16"}


def _describe_transformer(path: Path, quantised: bool) -> dict[str, Any]:
    checkpoint, found = read_checkpoint(path, shapes_only=True), peek(path)
    assert isinstance(checkpoint, Checkpoint)
    norms = _norms(checkpoint.projections)
    about: dict[str, Any] = {
        "layout": checkpoint.layout, "layers": checkpoint.num_layers, "width": checkpoint.width,
        "quantised": quantised, "sampler": found.sampler or "unipc", "sla": bool(norms), "proj_l_norms": norms,
        "trained": bool(norms) and min(norms) > 0, "faults": checkpoint.faults,
    }  # fmt: skip
    if found.sla is not None:
        about["trained_with"] = found.sla.to_dict()
    notes = [*found.notes, *([f"this {UNTOLD}"] if found.untold else [])]
    if found.few_steps:
        notes.append(f"the name or metadata say {found.few_steps!r}: it may be distilled to few steps without guidance")
    return about | ({"notes": notes} if notes else {})


def _describe_pipeline(folder: Path) -> dict[str, Any]:
    source = describe_folder(folder, folder.resolve().name)
    about: dict[str, Any] = {"path": str(folder), "kind": "pipeline", **vars(source.shape)}
    about["transformer"] = info(str(folder / "transformer"))
    if (folder / SLA_FILE).is_file():
        about["sla_file"] = info(str(folder / SLA_FILE))
    return about


def _describe_sla(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    metadata = read_metadata(path)
    norms = _norms({name: x for name, x in tensors.items() if ".proj_l." in name})
    untold = {"config", "tensors"} if metadata.tensors is not None else {"config", "tensors", "tensors_hash"}
    about = {name: value for name, value in vars(metadata).items() if name not in untold}
    return {
        "base_model": about.pop("base_model"), "trained_with": metadata.config.to_dict(), "metadata": about,
        "layers": len(norms), "proj_l_norms": norms, "trained": bool(norms) and min(norms) > 0,
    }  # fmt: skip


def _norms(projections: dict[str, Tensor]) -> list[float]:
    """The Frobenius norm of each layer's `proj_l` weight, in the layers' order."""
    weights = {int(name.split(".")[1]): x for name, x in projections.items() if name.endswith("proj_l.weight")}
    return [weights[layer].float().norm().item() for layer in sorted(weights)]
