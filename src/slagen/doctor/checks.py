"""`slagen doctor`: check packages, GPU, kernels, bundled model and disk, and say how to fix what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from slagen import packages
from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.fused import prove, unsupported
from slagen.errors import EnvironmentProblem, SlagenError
from slagen.machine import pick_dtype


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. `status`: "ok", "note" (works without it) or "problem"; `fix`: what to do."""

    name: str
    status: str
    found: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """What `slagen doctor --json` prints of it."""
        return dict(vars(self))


SHOWN = ("torch", "triton", "diffusers", "transformers", "ftfy")  # the others are only if they are missing or too old
WITHOUT = {
    "triton": "Linux only; PyTorch's CUDA builds include it",
    "ftfy": "without it, prompts are not cleaned as they were for the model's training",
    "matplotlib": "without it, slagen bench draws no plot",
    "rich": "without it, tables are plain text",
}
NOT_NEEDED = ("triton", "matplotlib", "rich")


def examine() -> list[Finding]:
    """Check packages, GPU, kernels, bundled model, hub cache and disk. Downloads nothing."""
    others = [name for name in packages.requirements() if name not in SHOWN and not packages.state(name)[1]]
    return [
        Finding("python", "ok", sys.version.split()[0]),
        *map(_package, (*SHOWN, *others)),
        *_gpu(),
        *_kernels(),
        _bundled_model(),
        *_disk(),
    ]


def _package(name: str) -> Finding:
    found, fits = packages.state(name)
    if fits:
        return Finding(name, "ok", found)
    fix = packages.install(name) + (f" ({WITHOUT[name]})" if name in WITHOUT else "")
    return Finding(name, "note" if name in NOT_NEEDED else "problem", found, fix)


def _not_checked(name: str, error: ImportError) -> Finding:
    """The finding for a check that needs a package which is missing or too old."""
    lack = packages.explain(error)
    if lack is None:
        raise error
    reason, _, fix = lack.partition(" Try ")
    return Finding(name, "problem", f"not checked: {reason}", fix.removesuffix("."))


def _gpu() -> list[Finding]:
    if not torch.cuda.is_available():
        reason = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        fix = "the bundled model runs without one; Wan2.1 needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
        return [Finding("gpu", "note", f"none: {reason}", fix)]
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = (card.major, card.minor) >= (8, 0)
        shared = getattr(card, "shared_memory_per_block_optin", card.shared_memory_per_block)
        text = (
            f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB, "
            f"{shared // 1024} KiB of shared memory, {'supports' if bf16 else 'does not support'} bf16"
        )
        fix = "" if bf16 else "use --dtype fp16: this GPU does not support bf16"
        found.append(Finding(f"gpu {index}", "ok" if bf16 else "note", text, fix))
    found.append(Finding("cuda", "ok", f"{torch.version.cuda}, driver {_driver()}"))
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (nvidia-smi is not installed)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return said[0] if said else "unknown (nvidia-smi printed nothing)"


def _kernels() -> list[Finding]:
    """One finding for each GPU, or for the CPU if there is none."""
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [_kernels_on(device) for device in cards or [torch.device("cpu")]]


def _kernels_on(device: torch.device) -> Finding:
    """Whether the kernels run, perhaps with smaller tiles, and agree with the reference."""
    name = "kernels" if device.index is None else f"kernels {device.index}"
    gave_way = []
    try:
        probe = torch.zeros(1, 1, 1, 128, dtype=pick_dtype("auto", device), device=device)
        reason = unsupported(probe)
        if reason is not None:
            return Finding(name, "note", f"attention uses the torch backend, because {reason}")
        for domain in ("all", "marginal"):
            wrong, before = prove(probe, SLAConfig(linear_domain=domain))  # type: ignore[arg-type]
            if wrong is not None:
                return Finding(
                    name,
                    "problem",
                    f"the Triton kernels give wrong results with the linear domain {domain}: {wrong}",
                    "use --backend torch, and report this as a bug",
                )
            gave_way += before
    except RuntimeError as error:  # of Triton, as KernelProblem says it, or of PyTorch: a card that is full or lost
        found, _, fix = str(error).partition(" Try ")
        lines = found.strip().splitlines() or [type(error).__name__]
        return Finding(name, "problem", lines[0].removesuffix("."), fix.removesuffix("."))
    agree = "the Triton kernels agree with the reference, forward and backward"
    if gave_way:
        return Finding(name, "note", f"{agree}, but some had to use smaller tiles: {'; '.join(gave_way)}")
    return Finding(name, "ok", agree)


def _bundled_model() -> Finding:
    """Load the bundled model, which also checks that its UMT5 embedding is tied."""
    try:
        from slagen.wan.loading import load_pipeline
        from slagen.wan.models import resolve_model

        source = resolve_model("tiny-wan", "cpu")
        pipe = load_pipeline(source, torch.float32)
    except ImportError as error:
        return _not_checked("bundled model", error)
    except SlagenError as error:
        return Finding("bundled model", "problem", str(error), "reinstall slagen")
    encoder = pipe.text_encoder
    tied = encoder.encoder.embed_tokens.weight is encoder.shared.weight
    if not tied:
        return Finding(
            "bundled model",
            "problem",
            "the text encoder's token embeddings were not loaded (UMT5's embed_tokens is not the shared "
            "embedding), so videos would be "
            "noise",
            "report this as a bug",
        )
    return Finding("bundled model", "ok", f"{source.folder}, with its text encoder's token embeddings loaded")


def _disk() -> list[Finding]:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        return [_not_checked("hub cache", error)]
    cache = Path(HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free / 2**30
    return [Finding("hub cache", "ok", f"{cache}, {free:.0f} GiB free")]


def check_gpu(findings: list[Finding]) -> None:
    """Raise EnvironmentProblem unless a GPU was found."""
    missing = next((finding for finding in findings if finding.name == "gpu"), None)
    if missing is not None:
        reason = missing.found.removeprefix("none: ")
        raise EnvironmentProblem(
            f"--require-gpu needs a usable GPU, but {reason}. Use a machine with an NVIDIA GPU, its driver and a CUDA "
            "build of PyTorch."
        )
