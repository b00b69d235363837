"""Time SLA's torch backend against dense attention on this CPU, and measure the memory that it needs.

    python benchmarks/attention_cpu.py --length 16384 32760

It runs the forward pass under inference_mode in float32, with B = 1, H = 12 and D = 128 (one layer of Wan2.1-1.3B),
95 % sparsity and blocks of 64. The time includes the block map, both branches and the projection proj_l. The runs of
the two alternate, so that both are affected if the machine slows down. Memory is measured in a fresh process: the peak
resident size during one call, minus the size just before it. That includes the output, but not the inputs, the
libraries and a first call on 256 tokens.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen import __version__
from slagen.attention.sla.config import Backend, SLAConfig
from slagen.attention.sla.functional import sparse_linear_attention
from slagen.machine import cpu_name

NUM_HEADS, HEAD_DIM = 12, 128
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--length", type=int, nargs="+", default=[16384, 32760], help="numbers of tokens (default: 16384 32760)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each kind of attention (default: 3)")
    parser.add_argument(
        "--domain", choices=["all", "marginal"], default="all", help="key blocks in the linear branch (default: all)"
    )
    parser.add_argument(
        "--layout",
        choices=["contiguous", "wan"],
        default="contiguous",
        help="memory layout of q, k and v; wan is (B, L, H, D), as in the model (default: contiguous)",
    )
    parser.add_argument("--json", type=Path, help="file to write (default: a new file in benchmarks/results)")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = SLAConfig(linear_domain=args.domain)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, config, args.layout)))
        return

    check(config)
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slagen": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {args.layout} layout, "
        f"linear domain {args.domain}"
    )
    rows = []
    for length in args.length:
        row = measure(length, args.repeats, config, args.layout)
        rows.append(row)
        memory = "not measured" if row["extra_memory_gib"] is None else f"{row['extra_memory_gib']:.3f} GiB"
        print(
            f"{length} tokens: SLA {spread(row['slagen_s'])}, dense {spread(row['dense_s'])}, "
            f"speed-up {row['speedup']:.2f}x, extra memory {memory}",
            flush=True,
        )

    result = {
        "benchmark": "attention_cpu",
        "machine": machine,
        "settings": {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "layout": args.layout, **config.to_dict()},
        "rows": rows,
    }
    name = re.sub(r"[^a-z0-9]+", "-", f"attention-cpu {machine['cpu']} {machine['date']}".lower()).strip("-")
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path)


@torch.inference_mode()
def check(config: SLAConfig) -> None:
    """Stop unless the torch backend agrees with the reference on a short sequence with a tail."""
    inputs = make_inputs(1000, "contiguous")
    expected = slagen(inputs, config, "reference")
    torch.testing.assert_close(slagen(inputs, config), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def measure(length: int, repeats: int, config: SLAConfig, layout: str) -> dict:
    """Time both, alternating, after a first run of each that is not counted (the dense one on fewer tokens)."""
    options = ["--memory-of", str(length), "--domain", config.linear_domain, "--layout", layout]
    child = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)

    inputs = make_inputs(length, layout)
    slagen(inputs, config)
    dense(make_inputs(2048, layout))
    slagen_s, dense_s = [], []
    for _ in range(repeats):
        slagen_s.append(seconds(lambda: slagen(inputs, config)))
        dense_s.append(seconds(lambda: dense(inputs)))
    num_key_blocks = config.num_blocks(length)[1]
    return {
        "length": length,
        "critical_blocks": config.num_critical(num_key_blocks),
        "key_blocks": num_key_blocks,
        "slagen_s": slagen_s,
        "dense_s": dense_s,
        "speedup": statistics.median(dense_s) / statistics.median(slagen_s),
        "extra_memory_gib": json.loads(child.stdout),
    }


@torch.inference_mode()
def memory_of(length: int, config: SLAConfig, layout: str) -> float | None:
    """How far one call lifts the peak of this process, in GiB; None where there is no /proc."""
    inputs = make_inputs(length, layout)
    slagen(make_inputs(256, layout), config)
    before = resident_kib("VmRSS")
    slagen(inputs, config)
    peak = resident_kib("VmHWM")
    return None if before is None or peak is None else (peak - before) / 2**20


def slagen(inputs: dict[str, Tensor], config: SLAConfig, backend: Backend = "torch") -> Tensor:
    q, k, v, weight, bias = inputs.values()
    return sparse_linear_attention(q, k, v, config, weight, bias, backend=backend)


def dense(inputs: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])


def make_inputs(length: int, layout: str) -> dict[str, Tensor]:
    """Seeded q, k, v (1, H, L, D), and the weight and bias of proj_l."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, NUM_HEADS, HEAD_DIM) if layout == "wan" else (1, NUM_HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    if layout == "wan":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    weight = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator) * HEAD_DIM**-0.5
    bias = torch.randn(HEAD_DIM, generator=generator)
    return {"q": q, "k": k, "v": v, "proj_weight": weight, "proj_bias": bias}


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def resident_kib(field: str) -> int | None:
    """A line of /proc/self/status. Unlike getrusage, its peak does not begin with that of the parent process."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) if found else None


if __name__ == "__main__":
    main()
