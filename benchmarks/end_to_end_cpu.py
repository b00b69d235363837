"""Time `slagen generate` from prompt to file on this CPU, dense against SLA, at several sizes, in one run.

    python benchmarks/end_to_end_cpu.py --size 128x128x17 192x192x33 256x256x33

Dense is PyTorch's own CPU attention, `F.scaled_dot_product_attention`; SLA is the model's weights at their sparsity on
slagen's torch backend. Every video is its own process, as a user starts it, and the two alternate, so that a machine
that slows down slows both. A step's time, and attention's in it, are over the steps of all videos; the denoising loop's
and the whole command's are over the videos. All are medians with quartiles, in seconds.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from slagen import __version__
from slagen.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = ("dense", "sla")
SIZES = ("128x128x17", "192x192x33", "256x256x33")
MEASURES = ("step_s", "attention_s", "loop_s", "command_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", nargs="+", default=SIZES, help=f"width x height x frames (default: {' '.join(SIZES)})"
    )
    parser.add_argument("--repeats", type=int, default=5, help="videos of each attention at each size (default: 5)")
    parser.add_argument("--model", default="tiny-wan", help="preset or folder (default: tiny-wan)")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--json", type=Path, help="where to write the result (default: benchmarks/results)")
    args = parser.parse_args()
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slagen": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, load {machine['load_before']:.2f}"
    )
    rows = []
    for size in args.size:
        row = measure(size, args)
        rows.append(row)
        print(describe(row), flush=True)
    result = {
        "benchmark": "end_to_end_cpu",
        "machine": machine,
        "settings": {"model": args.model, "prompt": args.prompt, "repeats": args.repeats},
        "rows": rows,
    }
    name = re.sub(r"[^a-z0-9]+", "-", f"end-to-end-cpu {machine['cpu']} {machine['date']}".lower()).strip("-")
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path)


def measure(size: str, args: argparse.Namespace) -> dict:
    """Both attentions at one size, alternating, after a short video of each that fills the file cache."""
    for attention in ATTENTIONS:
        video(size, attention, args, steps=1)
    videos = {attention: [] for attention in ATTENTIONS}
    for _ in range(args.repeats):
        for attention in ATTENTIONS:
            videos[attention].append(video(size, attention, args, args.steps))
    reports = {attention: [report for report, _ in videos[attention]] for attention in ATTENTIONS}
    times = {attention: summary(videos[attention]) for attention in ATTENTIONS}
    first = reports["sla"][0]
    return {
        "size": size,
        "steps": len(first["steps"]),
        "attention": {k: first["attention"][k] for k in ("tokens", "sparsity", "block_m", "critical", "key_blocks")},
        **times,
        "dense_over_sla": {m: times["dense"][m]["median"] / times["sla"][m]["median"] for m in MEASURES},
        "peak_memory_gib": {a: max(report["peak_memory_gib"] for report in reports[a]) for a in ATTENTIONS},
    }


def video(size: str, attention: str, args: argparse.Namespace, steps: int | None) -> tuple[dict, float]:
    """One video by the command in a process of its own: its report, and the seconds that the command took."""
    width, height, num_frames = size.split("x")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "slagen", "generate", args.prompt, "--model", args.model, "--device", "cpu",
                   "--attention", attention, "--size", f"{width}x{height}", "--num-frames", num_frames, "--seed", "0",
                   "--output", f"{folder}/video.mp4", "--json"]  # fmt: skip
        command += [] if steps is None else ["--steps", str(steps)]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout), time.perf_counter() - began


def summary(videos: list[tuple[dict, float]]) -> dict[str, dict]:
    """Each measure's median and quartiles."""
    steps = [step for report, _ in videos for step in report["steps"]]
    return {
        "step_s": quartiles([step["latency_ms"] / 1e3 for step in steps]),
        "attention_s": quartiles([step["attention_ms"] / 1e3 for step in steps]),
        "loop_s": quartiles([report["stages_s"]["denoise"] for report, _ in videos]),
        "command_s": quartiles([seconds for _, seconds in videos]),
    }


def quartiles(times: list[float]) -> dict[str, float | int]:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(times)}


def describe(row: dict) -> str:
    """A row in words, dense before SLA."""
    parts = []
    for name in MEASURES:
        dense, sla = (row[a][name] for a in ATTENTIONS)
        parts.append(
            f"  {name.removesuffix('_s'):9} dense {dense['median']:.3f} s ({dense['q1']:.3f} to {dense['q3']:.3f}), "
            f"SLA {sla['median']:.3f} s ({sla['q1']:.3f} to {sla['q3']:.3f}), {row['dense_over_sla'][name]:.2f} times"
        )
    about = row["attention"]
    head = f"{row['size']}: {about['tokens']} tokens, {about['critical']} of {about['key_blocks']} key blocks"
    return "\n".join([head, *parts])


if __name__ == "__main__":
    main()
