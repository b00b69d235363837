"""`slagen convert`: a weight file of any public form as a folder that slagen and diffusers read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from slagen.attention import registry
from slagen.attention.cost import ModelShape
from slagen.attention.learned import label
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.kinds import TRANSFORMERS, identify
from slagen.formats.model_files import SLA_FILE, read_json
from slagen.formats.peek import lacks_settings, peek
from slagen.formats.published import preset_of_width
from slagen.formats.sla import SLAMetadata, weights_hash
from slagen.formats.tensor_files import read_tensors
from slagen.formats.transformer import read_checkpoint
from slagen.io.files import reserved, write_json, writing
from slagen.io.paths import check_folder, check_utf8, user_path
from slagen.io.reading import file_hash
from slagen.io.text import counted, quote_path
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import BUNDLED, ModelSource, bundled_folder, describe_folder
from slagen.wan.install import save_sla
from slagen.wan.presets import WAN_1_3B
from slagen.wan.processor import install_method
from slagen.wan.transformer import build_transformer, wan_config
from slagen.wan.vae import load_vae

PARTS = ("scheduler", "text_encoder", "tokenizer", "vae", "image_encoder", "image_processor")
MAX_SHARD = "5GB"
MODEL_FILES = {"model_index.json", "config.json", "transformer"}  # one of them is in every folder that convert makes


def convert(
    source: str, output: str, *, base: str | None = None, dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False, part: str | None = None, on_note: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Write a transformer of any public form as a diffusers folder, with its attention weights in `sla.safetensors`.

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
            raise SlagenError(f"{target} cannot be written ({error}). Check the free space on its disk.") from error
    return target


def describe_base(base: str) -> ModelSource:
    """A pipeline's folder to take parts from: a folder, or the bundled model."""
    if base == BUNDLED:
        return describe_folder(bundled_folder(), BUNDLED)
    path = user_path(base)
    if not path.exists():
        raise UsageError(
            f"--model is {quote_path(base)}, but slagen convert needs a model folder on this machine. Give one, or "
            "leave --model out."
        )
    return describe_folder(path, path.resolve().name)


def _check_free(target: Path, overwrite: bool, read: list[Path]) -> None:
    """Raise UsageError where a folder may not be written: what is replaced is a model, and nothing that is read."""
    content = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if (content and not overwrite) or (os.path.lexists(target) and not target.is_dir()):
        raise UsageError(f"{target} exists. Choose another output, or replace a model folder with --overwrite.")
    if content and not content & MODEL_FILES:
        raise UsageError(f"{target} is not a model folder, so slagen does not overwrite it. Choose another output.")
    for path in read:
        if path.resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{target} would be replaced, but the input {path} is in it. Choose another output.")


def _convert_vae(path: Path, part: Path, folder: ModelSource | None) -> None:
    load_vae(path, None if folder is None else folder.folder / "vae").save_pretrained(part)


def _convert_transformer(
    path: Path, target: Path, folder: ModelSource | None, dtype: torch.dtype, part: str | None,
    on_note: Callable[[str], None],
) -> None:  # fmt: skip
    if path.suffix == ".gguf":
        raise UsageError(
            f"{path} is a GGUF file, which needs no conversion. Use it directly: slagen generate --weights {path}."
        )
    found = peek(path, part)
    if found.lacks_settings:
        raise WeightsError(f"{path} {lacks_settings(found.method)}")
    checkpoint = read_checkpoint(path, dtype, part=part) if found.kind in TRANSFORMERS else None
    if not isinstance(checkpoint, Checkpoint):
        raise UsageError(
            f"{path} contains only attention weights. Use it with its model: slagen generate --model MODEL "
            f"--weights {path}."
        )
    for note in found.notes:
        on_note(note)
    config = _config_for(checkpoint, folder)
    model = build_transformer(checkpoint, config, dtype)
    layers = len({name.split(".")[1] for name in checkpoint.projections})
    on_note(
        f"converted {counted(len(checkpoint.tensors), 'tensor')} from the {checkpoint.layout} format, with "
        f"{label(found.method)} weights in {counted(layers, 'layer')}"
    )
    model.save_pretrained(target / "transformer", max_shard_size=MAX_SHARD)
    distilled = found.sampler == "rcm"
    if found.trained_with is not None:
        name = folder.name if folder is not None else preset_of_width(checkpoint.width) or "wan2.1"
        metadata = SLAMetadata(
            found.trained_with,
            name,
            weights_hash(model),
            trained=found.trained or "all",
            steps=0,
            sampler_family="rcm" if distilled else "flow",
            source_hash=_digest(path),
            method=found.method,
            layer_sparsities=found.layer_sparsities,
        )
        install_method(model, registry.get(found.method), found.trained_with)
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
        what = f"lacks {error}" if isinstance(error, KeyError) else "has tensors with too few dimensions"
        raise WeightsError(
            f"{checkpoint.path} {what}, so it is not a complete transformer. Copy or download it again."
        ) from error
    if not width or width % head_dim:
        raise WeightsError(
            f"{checkpoint.path} has layers of width {width}, which is not a multiple of the head dimension "
            f"{head_dim}. With --model, give the pipeline that it belongs to."
        )
    shape = ModelShape(checkpoint.num_layers, width // head_dim, head_dim, ffn_dim, 512)
    image = tensors.get("condition_embedder.image_embedder.norm1.weight")
    if image is not None:
        sizes |= {"image_dim": image.shape[0], "added_kv_proj_dim": width}
    return {**wan_config(shape), **sizes}


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in order."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()
