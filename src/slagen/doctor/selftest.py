"""`slagen doctor --selftest`: a check of everything on one machine, whose result is attached to an issue.

Packages and device, kernels against the reference, a video of the bundled model, a short bench against dense attention.
A check that fails stops no other.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slagen import machine, packages
from slagen.attention import registry, sparse_linear_attention
from slagen.attention.mean.config import MeanConfig
from slagen.attention.sla import fused
from slagen.attention.sla.config import Backend, LinearDomain, SLAConfig
from slagen.attention.sla.functional import choose_backend
from slagen.attention.sla2.config import SLA2Config
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.rows import BenchRow
from slagen.device import Device
from slagen.doctor import checks as doctor
from slagen.doctor.checks import Finding
from slagen.errors import EnvironmentProblem, GateError, KernelProblem, SlagenError, UsageError
from slagen.generation.config import GenerateConfig
from slagen.io.files import scratch, write_json
from slagen.io.paths import user_path
from slagen.io.text import quote_path

SCHEMA_VERSION = 1
PROMPT = "a red circle moving right"
OK, FAILED, MISSING = "ok", "failed", "missing"
BENCH = BenchConfig(
    shapes=("wan-1.3b-480p",), lengths=(4096,), seconds=1.0, sparsities=(0.95,), methods=("sla", "sdpa")
)
BENCH_ON_CPU = dataclasses.replace(BENCH, shapes=("1x2x4096x64",), lengths=(), device="cpu")
OTHER_KERNELS = {  # than those of SLA: a method that runs them, and how
    "block means": ("mean", MeanConfig()),
    "int8": ("sla2", SLA2Config(low_bit="int8")),
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `status`: "ok", "failed", or "missing" where the machine lacks what it takes."""

    name: str
    status: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Machine:
    """What a self-test ran on, and with which packages."""

    device: Device
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {**self.device.to_dict(), "versions": self.versions}


@dataclass(frozen=True)
class Selftest:
    """The result of every check.

    Args:
        findings: of `doctor`. bench: rows of the short bench; None where it did not run.
    """

    date: str
    machine: Machine
    findings: list[Finding]
    bench: list[BenchRow] | None
    checks: list[Check]

    def to_dict(self) -> dict[str, Any]:
        """What --json prints and the file holds."""
        return {
            "selftest": SCHEMA_VERSION, "date": self.date, "machine": self.machine.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "bench": None if self.bench is None else [row.to_dict() for row in self.bench],
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }  # fmt: skip


class Wrong(Exception):
    """What a check found wrong."""


def selftest(on_note: Callable[[str], None] = lambda text: None) -> Selftest:
    """Check everything that this machine can run, on its GPU or else on its CPU.

    Args:
        on_note: called with one line for each check that begins.
    Returns: what came of it; paths of the user are shortened.
    """
    device = machine.pick_device("auto")
    date, about = datetime.now(UTC).isoformat(timespec="seconds"), machine.describe_device(device)
    findings: list[Finding] = []
    rows: list[BenchRow] = []
    parts: list[tuple[str, Callable[[], str]]] = [("doctor", partial(_examine, findings))]
    for backend, dtype in kernels_here(device):
        for head_dim in (64, 128):
            for domain in ("all", "marginal"):
                name = f"{backend} {dtype}, head dimension {head_dim}, domain {domain}"
                parts.append((name, partial(_agrees, device, backend, dtype, head_dim, domain)))
            if backend == "triton":
                parts += [
                    (f"{name}, {dtype}, head dimension {head_dim}", partial(_tried, device, dtype, head_dim, *tried))
                    for name, tried in OTHER_KERNELS.items()
                ]
    parts += [("VAE in bf16", partial(_vae_in_bf16, device))]
    parts += [("generate", partial(_generate, device)), ("bench", partial(_bench, device, rows))]
    checks = []
    for name, part in parts:
        on_note(name)
        checks.append(_try(name, part))
    return shortened(Selftest(date, Machine(about, packages.versions()), findings, rows or None, checks))


def kernels_here(device: torch.device) -> list[tuple[Backend, str]]:
    """Backends and dtypes that run here: Triton's where it is chosen of itself, otherwise PyTorch's.

    In Triton's interpreter, where that is on, Triton's too, but for bf16, which it computes wrongly.
    """
    dtypes = ["fp16", "bf16", "fp32"]
    if machine.pick_dtype("auto", device) is torch.float16:  # a card that lacks bf16
        dtypes.remove("bf16")
    probe = torch.empty(1, 1, 1, 64, device=device)
    chosen = choose_backend(probe)
    found: list[tuple[Backend, str]] = [(chosen, dtype) for dtype in dtypes]
    if chosen == "torch" and fused.unsupported(probe) is None:
        found += [("triton", "fp16"), ("triton", "fp32")]
    return found


def _try(name: str, part: Callable[[], str]) -> Check:
    """Run one check; whatever it raises is its result."""
    began = time.perf_counter()
    try:
        status, detail = OK, part()
    except (EnvironmentProblem, ImportError) as error:
        status, detail = MISSING, str(error)
    except (Wrong, SlagenError) as error:
        status, detail = FAILED, str(error)
    except Exception as error:  # a crash is what the test is for: it goes into the file, and the next check runs
        status, detail = FAILED, f"{type(error).__name__}: {error}"
    return Check(name, status, round(time.perf_counter() - began, 3), detail)


def _examine(findings: list[Finding]) -> str:
    """What `doctor` finds, which is added to `findings`."""
    findings += doctor.examine()
    problems = [f"{finding.name}: {finding.found}" for finding in findings if finding.status == "problem"]
    if problems:
        raise EnvironmentProblem("; ".join(problems))
    return f"{len(findings)} checks, no problems"


def _agrees(device: torch.device, backend: Backend, dtype: str, head_dim: int, domain: LinearDomain) -> str:
    """Forward and backward against the float64 reference, on two heads of a few blocks."""
    q = torch.empty(1, 1, 1, head_dim, dtype=machine.DTYPES[dtype], device=device)
    config = SLAConfig(linear_domain=domain)
    wrong, gave_way = fused.prove(q, config) if backend == "triton" else (_torch_trial(q, config), [])
    if wrong is not None:
        raise Wrong(wrong)
    smaller = f"; some kernels had to use smaller tiles: {'; '.join(gave_way)}" if gave_way else ""
    return f"the output and all gradients agree with the float64 reference{smaller}"


def _tried(device: torch.device, dtype: str, head_dim: int, method: str, config: Any) -> str:
    """Kernels of another method, tried as before a run with it."""
    check = registry.get(method).check
    assert check is not None
    try:
        check("triton", head_dim, device, machine.DTYPES[dtype], config)
    except KernelProblem as error:
        raise Wrong(str(error)) from error
    return f"{method} attention agrees with its reference"


def _torch_trial(q: torch.Tensor, config: SLAConfig) -> str | None:
    """As `fused.trial`, for the torch backend."""
    length, head_dim = 3 * config.block_m + 5, q.shape[-1]
    small = dataclasses.replace(config, sparsity=0.5)
    generator = torch.Generator(q.device).manual_seed(0)
    shapes = [*[(1, 2, length, head_dim)] * 3, (head_dim, head_dim), (head_dim,)]
    inputs = [torch.randn(shape, generator=generator, device=q.device) for shape in shapes]
    inputs = [(x if x.ndim == 4 else x * head_dim**-0.5).to(q.dtype if x.ndim == 4 else x.dtype) for x in inputs]

    def results(backend: Backend, given: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        o = sparse_linear_attention(leaves[0], leaves[1], leaves[2], small, leaves[3], leaves[4], backend=backend)
        return [o, *torch.autograd.grad(o.sum(), leaves)]

    with torch.enable_grad():
        found, truth = results("torch", inputs), results("reference", [x.double() for x in inputs])
    return fused.first_fault(found, truth, q.dtype)


@torch.inference_mode()
def _vae_in_bf16(device: torch.device) -> str:
    """The bundled VAE's frames in bf16 beside those in fp32, and the time of both: what --vae-dtype bf16 would do."""
    from slagen.wan.folder import bundled_folder
    from slagen.wan.vae import decode_latents, load_vae

    folder = bundled_folder() / "vae"
    frames, times = [], []
    for dtype in (torch.float32, torch.bfloat16):
        vae = load_vae(folder, folder, dtype).to(device)
        drawn = torch.randn(1, vae.config.z_dim, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        frames.append(decode_latents(vae, drawn).float())
        began = time.perf_counter()
        decode_latents(vae, drawn)  # ends on the CPU, so the GPU has done all
        times.append(time.perf_counter() - began)
    off = (frames[0] - frames[1]).abs()
    psnr = 20 * math.log10(255 / max(off.square().mean().sqrt().item(), 1e-9))
    return (
        f"frames of random latents differ by at most {off.max().item():.0f} of 255 from those in fp32, PSNR "
        f"{psnr:.1f} dB; {1e3 * times[1]:.1f} ms instead of {1e3 * times[0]:.1f}"
    )


def _generate(device: torch.device) -> str:
    """A video of the bundled model, through Triton on a card."""
    from slagen.generation.generate import generate

    backend = choose_backend(torch.empty(1, 1, 1, 64, device=device))
    with scratch() as folder:
        config = GenerateConfig(
            PROMPT,
            model="tiny-wan",
            backend=backend,
            steps=4,
            seed=0,
            output=str(folder / "video.mp4"),
            no_cache=True,
        )
        video = generate(config).videos[0]
        size = len(video.mp4())
    if size == 0:
        raise Wrong("the video is empty")
    return f"4 steps with the {backend} backend, {size:,} bytes, latents hash {video.record.latents_hash[:12]}"


def _bench(device: torch.device, rows: list[BenchRow]) -> str:
    """A short bench, whose rows are added to `rows`."""
    from slagen.benchmark.run import bench

    config = BENCH_ON_CPU if device.type == "cpu" else BENCH
    result = bench(config)
    rows += result.rows
    wrong = [f"{row.method}: {row.reason}" for row in result.rows if row.correct is False]
    if wrong:
        raise Wrong("; ".join(wrong))
    return f"speed-up of SLA over dense attention: {', '.join(result.speedups)}"


def shortened(value: Any) -> Any:
    """The same with the home folder as ~, and the folders of slagen and of this run by what they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **shortened(vars(value)))
    if isinstance(value, dict):
        return {name: shortened(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shortened(part) for part in value]
    if not isinstance(value, str):
        return value
    folders = {str(Path(__file__).parents[1]): "(slagen)", os.getcwd(): "(here)", str(Path.home()): "~"}
    folders[tempfile.gettempdir()] = "(temporary)"
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            value = value.replace(folder, folders[folder])
    return value


def claim(output: str | None) -> Path:
    """Where the result goes. Raises UsageError before the work if it cannot be written."""
    path = user_path(output or f"slagen-selftest-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"output is {quote_path(path)}, but must be a file in an existing, writable folder.")
    return path


def write(result: Selftest, path: Path) -> None:
    write_json(path, result.to_dict())


def check(result: Selftest) -> None:
    """Raise GateError if a check failed, EnvironmentProblem if one could not run."""
    for status, verb, problem in ((FAILED, "failed", GateError), (MISSING, "could not run", EnvironmentProblem)):
        found = [row for row in result.checks if row.status == status]
        if found:
            raise problem(
                f"{len(found)} of {len(result.checks)} checks {verb}. The first is {found[0].name}: {found[0].detail}"
            )
