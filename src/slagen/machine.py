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


class PeakMemory:
    """The most memory held in each of the spans between two calls of `take`: of the card on CUDA, otherwise of the
    process.

    Where a peak cannot be forgotten, only that of a span which exceeds all before it is known.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.owner = "card" if device.type == "cuda" else "process"
        self.unknown: str | None = None  # why some are not known
        self._most = self._before = 0.0
        self.take()

    def take(self) -> float | None:
        """GiB: the most since the last call of this; None where that is not known."""
        peak, before = self._read(), self._before
        self._most = max(self._most, peak)
        self._before = 0.0 if self._forget(peak) else peak
        return peak if peak > before or self._before == 0 else None

    def most(self) -> float:
        """GiB: the most so far."""
        return max(self._most, peak_memory_gib(self.device))

    def _read(self) -> float:
        if self.owner == "process" and sys.platform == "linux":  # what can be reset is not in getrusage alike
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
        return peak_memory_gib(self.device)

    def _forget(self, peak: float) -> bool:
        """Have the system begin anew; False where it does not."""
        if self.owner == "card":
            if peak:  # or CUDA has not begun yet
                torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            reason = error.strerror or str(error)
            self.unknown = f"this system does not let a process reset its peak memory (/proc/self/clear_refs: {reason})"
            return False
        return True


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
