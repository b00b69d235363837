"""Run the tests and benchmarks that need a GPU: `make gpu`, on a machine with one CUDA device.

    python scripts/gpu.py                  run all parts that have no result yet, in order
    python scripts/gpu.py --part smoke     run one part, even if it has a result
    python scripts/gpu.py --tables         print the README's tables from the results of every GPU

Each part runs in its own process, takes at most nine minutes, and writes one JSON file to benchmarks/results/<GPU>/.
A part that has a file is skipped, so run the same command again to resume. Two parts run only if they are named:
--part tiny trains the bundled model from scratch, and --part sla-table does the missing runs of its table of training
methods.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 9 * 60
ON_REQUEST = ("tiny", "sla-table")
SHAPE = (1, 12, 32760)  # of the sweep: batch, heads, tokens of Wan2.1 1.3B at 480p
SLAGEN = [sys.executable, "-m", "slagen"]
SWEEP = {  # kernel -> tiles to try: query rows, key columns, warps, stages
    "attend": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 2),
               (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 3)],
    "states": [(64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3), (32, 32, 8, 2), (32, 32, 4, 3), (64, 64, 4, 2)],
    "dq": [(128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    "dkv": [(64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)],
}  # fmt: skip


def bench(*options: str, name: str, folder: Path) -> None:
    """One `slagen bench`, whose JSON becomes the part's result and whose files lie in a folder of its name."""
    command = [*SLAGEN, "bench", *options, "--output", str(folder / name)]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    (folder / f"{name}.json").write_text((folder / name / "bench.json").read_text())


def smoke(folder: Path) -> None:
    """A video of the bundled model with the Triton kernels: what every user does first."""
    video = ROOT / "build" / "smoke.mp4"
    command = [*SLAGEN, "generate", "a red circle moving right", "--model", "tiny-wan", "--backend", "triton",
               "--output", str(video), "--overwrite"]  # fmt: skip
    subprocess.run(command, check=True, timeout=LIMIT_S)
    report = json.loads(video.with_suffix(".json").read_text())
    save(folder / "smoke.json", {name: report[name] for name in ("attention", "stages_s", "steps", "latents_hash")})


def tests(folder: Path) -> None:
    """The tests that need a GPU, bf16 among them; several at a time, for most of their time goes into compiling."""
    files = ["tests/kernels/test_kernels.py", "tests/attention/test_attention.py", "tests/wan/test_rotary.py"]
    command = [sys.executable, "-m", "pytest", *files, "-k", "not costs", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    print(result.stdout[-3000:], result.stderr[-3000:], flush=True)
    if result.returncode:
        raise SystemExit(f"tests failed: exit code {result.returncode}")
    save(folder / "tests.json", {"output": result.stdout.splitlines()[-40:]})


def sweep(path: Path, head_dim: int, block_m: int, candidates: dict[str, list[tuple[int, int, int, int]]]) -> None:
    """Time every candidate tile of every kernel at one head dimension and block size, and name the fastest of each.

    A tile is first held against the reference, forward and backward; a wrong one is recorded and not timed. The rows
    lie in a file beside `path` until all are there, so a sweep that was cut short, or whose tile brought the device
    down, goes on after that tile.

    Args:
        path: of the result. candidates: kernel -> tiles, as SWEEP.
    """
    import torch

    from slagen.attention.sla.config import SLAConfig
    from slagen.attention.sla.fused import verify
    from slagen.kernels import resources

    began, partial = time.monotonic(), path.with_suffix(".part")
    rows = json.loads(partial.read_text()) if partial.exists() else []
    config = SLAConfig(0.95, block_m=block_m, block_n=64)
    drawn = [torch.randn(*SHAPE, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    proj = torch.randn(head_dim, head_dim, device="cuda") * head_dim**-0.5, torch.randn(head_dim, device="cuda")
    verify(drawn[0], config)  # what the other kernels run with
    for kernel, tiles in candidates.items():
        blocks = (64, 64) if kernel in resources.SQUARE else (block_m, 64)
        for tile in dict.fromkeys(resources.Tiles(*tile).within(*blocks) for tile in tiles):
            ran = list(dataclasses.astuple(tile))
            if any(row["kernel"] == kernel and row["tile"] == ran for row in rows):
                continue
            if time.monotonic() - began > LIMIT_S - 60:
                raise SystemExit(f"out of time (tiles timed: {len(rows)}). Run again to resume.")
            row = {"kernel": kernel, "head_dim": head_dim, "block_m": block_m, "tile": ran, "ms": None, "reason": None}
            rows.append(row)
            partial.write_text(json.dumps([*rows[:-1], {**row, "reason": "brought the process down"}]))
            row["ms"], row["reason"] = measure(kernel, tile, drawn, config, proj)
            partial.write_text(json.dumps(rows))
            print(row, flush=True)
            torch.cuda.synchronize()  # raises where the device is lost: what came after would fail for that alone
    fastest = {
        kernel: min((row for row in rows if row["kernel"] == kernel and row["ms"]), key=lambda r: r["ms"], default=None)
        for kernel in candidates
    }
    save(path, {"fastest": fastest, "rows": rows})
    partial.unlink()


def measure(kernel: str, tile, drawn, config, proj) -> tuple[float | None, str | None]:
    """Milliseconds of a tile that is right, or what is wrong with it."""
    import torch

    from slagen.attention import sparse_linear_attention
    from slagen.attention.sla.fused import trial
    from slagen.kernels import resources

    with resources.using(resources.current().with_tile(kernel, tile)):
        try:
            if (fault := trial(drawn[0], config)) is not None:
                return None, fault
            value = time_call(sparse_linear_attention, drawn, config, proj, backward=kernel in ("dq", "dkv"))
            torch.cuda.synchronize()
        except Exception as error:  # a tile that a card can not run is a result of the sweep
            return None, f"{type(error).__name__}: {error}"[:200]
    return value, None


def time_call(attend, drawn, config, proj, backward: bool) -> float:
    """Median milliseconds of 15 calls, forward under inference mode, or forward and backward."""
    import statistics

    import torch

    q, k, v, do = drawn
    if backward:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    times = []
    for i in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.inference_mode(not backward):
            o = attend(q, k, v, config, *proj, backend="triton")
        if backward:
            torch.autograd.grad(o, (q, k, v), do)
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def tiny(folder: Path) -> None:
    """Make the bundled model anew, in place of weights/tiny-wan: each stage in what is left of nine minutes; run it
    again to go on."""
    scripts = ROOT / "scripts" / "tiny_wan"
    work = ["--work", str(ROOT / "build" / "tiny-wan")]
    stages = ["train_vae.py --minutes 2", "encode.py", "train_dit.py", "train_text.py", "export.py", "tune.py"]
    for stage in map(str.split, stages):
        subprocess.run([sys.executable, str(scripts / stage[0]), *stage[1:], *work], check=True, timeout=LIMIT_S)
    result = folder / "tiny.json"
    subprocess.run([sys.executable, str(scripts / "evaluate.py"), "--dtype", "bf16", "--json", str(result)],
                   check=True, timeout=LIMIT_S)  # fmt: skip


def sla_table(folder: Path) -> None:
    """The runs of the comparison table that fit into nine minutes, into its own file; run it again to go on."""
    script = str(ROOT / "scripts" / "tiny_wan" / "sla_table.py")
    subprocess.run([sys.executable, script, "--limit", "5"], check=True, timeout=LIMIT_S)
    subprocess.run([sys.executable, script, "--table"], check=True, timeout=LIMIT_S)


def save(path: Path, content: dict) -> None:
    """Write a result with card, date and versions, whole or not at all."""
    import torch

    from slagen.io import files
    from slagen.machine import describe_device
    from slagen.packages import versions

    about = {
        "machine": {**describe_device(torch.device("cuda")).to_dict(), "versions": versions()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_json(path, {**about, **content})


def loop(name: str, folder: Path, *options: str) -> None:
    bench("--random-init", "wan-1.3b", "--steps", "4", *options, name=name, folder=folder)


PARTS = {
    "smoke": smoke,
    "tests": tests,
    "selftest": lambda folder: subprocess.run([*SLAGEN, "doctor", "--selftest", "--output",
                                               str(folder / "selftest.json")], check=True, timeout=LIMIT_S),
    "sweep-d128-m64": lambda folder: sweep(folder / "sweep-d128-m64.json", 128, 64, SWEEP),
    "sweep-d128-m128": lambda folder: sweep(folder / "sweep-d128-m128.json", 128, 128, SWEEP),
    "sweep-d64-m64": lambda folder: sweep(folder / "sweep-d64-m64.json", 64, 64, SWEEP),
    "bench-1.3b-480p": lambda folder: bench("--shape", "wan-1.3b-480p", "--sparsity", "0.9", "--sparsity", "0.95",
                                            "--sparsity", "0.97", "--seconds", "1",
                                            name="bench-1.3b-480p", folder=folder),
    "bench-1.3b-720p": lambda folder: bench("--shape", "wan-1.3b-720p", "--sparsity", "0.95", "--no-length-sweep",
                                            "--seconds", "1", name="bench-1.3b-720p", folder=folder),
    "bench-14b-720p": lambda folder: bench("--shape", "wan-14b-720p", "--sparsity", "0.95", "--no-length-sweep",
                                           "--no-backward", "--seconds", "1", name="bench-14b-720p", folder=folder),
    "bench-marginal": lambda folder: bench("--shape", "wan-1.3b-480p", "--sparsity", "0.95", "--linear-domain",
                                           "marginal", "--method", "sla", "--method", "sdpa-flash", "--no-length-sweep",
                                           name="bench-marginal", folder=folder),
    "loop-1.3b-480p": lambda folder: loop("loop-1.3b-480p", folder, "--compile"),
    "tiny": tiny,
    "sla-table": sla_table,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=list(PARTS), action="append", help="run only this part, even if it has a result"
    )
    parser.add_argument("--tables", action="store_true", help="print the results as Markdown tables and exit")
    args = parser.parse_args()
    if args.tables:
        print_tables()
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device, but PyTorch sees none. Try slagen bench --device cpu.")
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = RESULTS / card
    folder.mkdir(parents=True, exist_ok=True)
    names = args.part or [name for name in PARTS if name not in ON_REQUEST and not (folder / f"{name}.json").exists()]
    failed = []
    for name in names:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", f"import gpu, pathlib; gpu.PARTS[{name!r}](pathlib.Path({str(folder)!r}))"]
        part = subprocess.Popen(command, cwd=ROOT / "scripts", env=environment, start_new_session=True)
        try:
            result = f"exit code {part.wait(LIMIT_S)}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {LIMIT_S} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)  # with all that it began
        if result != "exit code 0":
            failed.append(name)
            print(f"{name} failed: {result}", flush=True)
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}. The other parts have results. Run make gpu to try again.")


def print_tables() -> None:
    """Every bench result as the README shows it."""
    from slagen.benchmark.tables import BenchResult, markdown

    for path in sorted(RESULTS.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "break_even_tokens" in content:
            print(f"<!-- {path.relative_to(ROOT)} -->\n{markdown(BenchResult.from_dict(content))}")


if __name__ == "__main__":
    main()
