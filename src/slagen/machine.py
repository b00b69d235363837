"""Which machine this is, which of its devices runs, and how much memory a run took."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from slagen.device import Device
from slagen.errors import EnvironmentProblem
from slagen.io.text import counted, quote, read_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def describe_device(device: torch.device) -> Device:
    """The device and its host, for reports."""
    cpu = cpu_name()
    about: dict[str, Any] = {"type": "cpu", "name": cpu}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about = {"type": "cuda", "name": card.name, "memory_gib": card.total_memory / 2**30,
                 "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}  # fmt: skip
    return Device(**about, cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), platform=platform.platform())


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: of the card on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if platform.system() == "Windows":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def process_age_s() -> float:
    """Seconds since the operating system started this process, long before Python's first line."""
    if sys.platform == "linux":  # psutil takes the time of boot in whole seconds there
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # in ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - psutil.Process().create_time()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def pick_device(name: str) -> torch.device:
    """The device that a name means: "auto" is CUDA where there is one. Raises UsageError or EnvironmentProblem."""
    if read_device(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    cards = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise EnvironmentProblem(
            f"device is {quote(name)}, but PyTorch {torch.__version__} sees {counted(cards, 'CUDA device')}. "
            "Try --device cpu, or install a CUDA build of PyTorch."
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means: "auto" is bf16 on CUDA, fp16 where a card lacks that, and fp32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):  # which the question is about
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
