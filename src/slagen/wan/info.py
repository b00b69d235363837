"""`slagen info`: what a weight file or a model's folder holds, as numbers and words."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from slagen.formats.checkpoint import Checkpoint
from slagen.formats.headers import read_header
from slagen.formats.kinds import REFUSALS, identify
from slagen.formats.model_files import SLA_FILE
from slagen.formats.names import transformers
from slagen.formats.peek import UNTOLD, peek
from slagen.formats.reading import gguf_kinds, read_tensors
from slagen.formats.side_file import SideFile
from slagen.formats.sla import read_metadata
from slagen.formats.transformer import read_checkpoint
from slagen.io.paths import user_path
from slagen.wan.folder import describe_folder


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
