"""Compare ways of training SLA with `slagen finetune` on the bundled model, as in the tables of weights/README.md.

    python scripts/tiny_wan/sla_table.py                    do every run that has no result yet, the main ones first
    python scripts/tiny_wan/sla_table.py --size 256x256x33  only the runs at this size
    python scripts/tiny_wan/sla_table.py --limit 60         start no further run after 60 minutes
    python scripts/tiny_wan/sla_table.py --table            only rebuild the tables from the results so far

Run the same command again to resume. If the command is started twice, the two processes share the runs: on a machine
with few cores, one process per core (OMP_NUM_THREADS=1 taskset -c K) is faster than one process on all cores. Each
result is written to benchmarks/results/tiny-wan-sla-table.json at once, with its machine, and the tables in
weights/README.md are rebuilt from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from scenes import SIZES, Size

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "tiny-wan"
RESULTS = ROOT / "benchmarks" / "results" / "tiny-wan-sla-table.json"
README = ROOT / "weights" / "README.md"
MARKS = ("<!-- sla table -->\n", "<!-- end of sla table -->\n")
UNTUNED = "critical only, not tuned"
CUBES = ["--order", "cube"]  # better than raster by the measurements in scripts/tiny_wan/README.md
ROWS = {  # name in the table -> what slagen finetune is told
    UNTUNED: [],
    "critical only": ["--attention", "sparse", *CUBES],
    "random blocks only": ["--attention", "sparse", "--selector", "random", *CUBES],
    "linear only": ["--attention", "linear", *CUBES],
    "SLA all": ["--attention", "sla", "--linear-domain", "all", *CUBES],
    "SLA marginal, 10 % negligible": [
        "--attention",
        "sla",
        "--linear-domain",
        "marginal",
        "--negligible",
        "0.1",
        *CUBES,
    ],  # fmt: skip
    "SLA2": ["--attention", "sla2", "--stages", "router,all", *CUBES],
    "block means": ["--attention", "mean", *CUBES],
    "dense, tuned as long": ["--attention", "dense", "--loss", "flow"],
}
AT = (0, 50, 250, 1000)  # steps that have a column
SPARSITIES = (0.9, 0.95, 0.97)
NUM_CLIPS = dict(zip(SIZES, (64, 32, 16), strict=True))  # that adherence is measured on
NUM_VIDEOS = dict(zip(SIZES, (256, 96, 64), strict=True))
BATCHES = dict(zip(SIZES, (8, 2, 1), strict=True))  # clips in a step: of 2,560, 2,592 and 2,304 tokens together


@dataclass(frozen=True)
class Run:
    """One training of a row."""

    row: str
    size: Size
    sparsity: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.row}/{self.size}/{self.sparsity:g}/{self.seed}/{self.steps}"

    @property
    def folder(self) -> Path:
        return WORK / "table" / self.key.replace("/", "-").replace(" ", "-").replace(",", "").replace("%", "percent")


def runs() -> list[Run]:
    """All of them, the most telling first."""
    small, middle, large = SIZES
    both = ("SLA all", "critical only")
    tuned = [row for row in ROWS if row != UNTUNED]
    wanted = [Run(row, size, 0.95, 0, 250) for size in (large, middle) for row in tuned]
    wanted += [Run(row, middle, 0.95, seed, 250) for seed in (1, 2) for row in (*both, "linear only", "SLA2")]
    wanted += [Run(UNTUNED, size, sparsity, 0, 0) for size in SIZES for sparsity in SPARSITIES]
    wanted += [Run(row, small, 0.95, 0, 250) for row in tuned]
    wanted += [Run(row, large, sparsity, 0, 250) for sparsity in (0.9, 0.97) for row in (*both, "SLA2")]
    wanted += [Run(row, large, 0.95, seed, 250) for seed in (1, 2) for row in (*both, "linear only", "SLA2")]
    return wanted + [Run(row, size, 0.95, 0, 1000) for size in (large, middle) for row in both]


def train(run: Run, data: Path, dtype: str) -> dict:
    """One `slagen finetune`, unless it has ended before; returns its result.json."""
    ended = run.folder / "result.json"
    if ended.exists():
        return json.loads(ended.read_text())
    command = [sys.executable, "-m", "slagen", "finetune", "--model", "tiny-wan", "--from-dense", "--data", str(data)]
    every = "50" if run.steps <= 250 else "250"
    command += [*ROWS[run.row], "--seed", str(run.seed), "--steps", str(run.steps), "--validate-every", every]
    command += ["--dtype", dtype, "--batch-size", str(BATCHES[run.size]), "--output", str(run.folder)]
    if not run.row.startswith("dense"):
        command += ["--sparsity", str(run.sparsity)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return json.loads(ended.read_text())


def adherence(run: Run) -> dict:
    """How many held-out prompts a run's weights get right, with the latents' distance to the dense model's."""
    import torch
    from checker import check
    from common import save_tensors
    from diffusers import WanPipeline
    from evaluate import ATTRIBUTES, held_out, sample

    from slagen.attention import registry
    from slagen.attention.sla.config import SLAConfig
    from slagen.formats.transformer import read_checkpoint
    from slagen.machine import describe_device
    from slagen.wan.install import apply_sla, load_weights
    from slagen.wan.loading import load_pipeline
    from slagen.wan.models import resolve_model
    from slagen.wan.samplers import set_sampler
    from slagen.wan.vae import decode_latents

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model("tiny-wan", device.type)
    scenes, prompts, seeds = held_out(NUM_CLIPS[run.size])

    def latents(prepare) -> tuple[torch.Tensor, WanPipeline]:
        pipe = load_pipeline(source, torch.bfloat16).to(device)
        set_sampler(pipe, source.defaults.sampler, source.defaults.flow_shift)
        prepare(pipe)
        return sample(pipe, prompts, seeds, source.defaults, source.defaults.steps, run.size), pipe

    def tuned(pipe) -> None:
        if run.row == UNTUNED:
            apply_sla(pipe, SLAConfig(run.sparsity, block_m=16, block_n=16, order="cube"), branches="sparse")
        elif run.row.startswith("dense"):
            checkpoint = read_checkpoint(run.folder / "transformer.safetensors", torch.bfloat16)
            pipe.transformer.load_state_dict(checkpoint.tensors)
        else:
            method = ROWS[run.row][ROWS[run.row].index("--attention") + 1]
            load_weights(pipe, run.folder / "sla.safetensors", registry.get(method), allow_untrained=True)

    kept = WORK / "table" / f"dense-latents-{run.size}.pt"
    if not kept.exists():
        save_tensors(kept, latents(lambda pipe: None)[0])
    dense = torch.load(kept, weights_only=True)
    found, pipe = latents(tuned)
    with torch.inference_mode():
        clips = [decode_latents(pipe.vae, z[None]).numpy() for z in found]
    right = [check(clip).right(scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {
        "clips": NUM_CLIPS[run.size], **{a: sum(r[a] for r in right) / len(right) for a in ATTRIBUTES},
        "latents_error_to_dense": ((found - dense).norm() / dense.norm()).item(),
        "device": describe_device(device).to_dict(),
    }  # fmt: skip


def read_results() -> dict[str, dict]:
    """Results by key of the run."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def add_result(run: Run, result: dict) -> None:
    """Put a run's result into the file and the tables, beside those of other processes."""
    from slagen.io.files import write_json
    from slagen.packages import versions

    with FileLock(WORK / "table" / "results.lock"):
        now = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
        results = {**read_results(), run.key: {**result, **now}}
        write_json(RESULTS, {"about": __doc__.splitlines()[0], "runs": results})
        write_tables(results)


def do(run: Run, dtype: str) -> None:
    """Train and measure, unless that is done or another process is at it."""
    from tune import prepare_data

    try:
        with FileLock(WORK / "table" / f"{run.folder.name}.lock", timeout=0):
            if run.key in read_results():
                return
            print(run.key, flush=True)
            if run.row == UNTUNED:
                before = read_results().get(Run("critical only", run.size, run.sparsity, 0, 250).key, {})
                first = {step: error for step, error in before.get("errors", {}).items() if step == "0"}
                add_result(run, {"errors": first, "dtype": dtype, "adherence": adherence(run)})
                return
            with FileLock(WORK / f"data-{run.size}.lock"):
                num_videos = {run.size: NUM_VIDEOS[run.size]}
                data = prepare_data(WORK / str(run.size), ROOT / "weights" / "tiny-wan", num_videos)
            result = train(run, data, dtype)
            log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
            errors = {str(line["step"]): line["error"] for line in log if line["event"] == "validation"}
            errors[str(run.steps)] = result["teacher_error_after"]
            measured = {"errors": errors, "layer_errors": result["layer_errors_after"], "seconds": result["seconds"]}
            add_result(run, {**measured, "dtype": dtype, "adherence": adherence(run)})
    except Timeout:
        print(f"{run.key}: skipped, because another process is working on it", flush=True)


def tables(results: dict[str, dict]) -> str:
    """The results as Markdown, one table for each size that has any."""
    measured = [size for size in SIZES[::-1] if any(key.split("/")[1] == str(size) for key in results)]
    return "\n".join(f"At {size}, {size.tokens:,} tokens:\n\n{table(results, size)}" for size in measured)


def table(results: dict[str, dict], size: Size) -> str:
    """The results at one size as Markdown."""
    lines = [
        "| row | sparsity | " + " | ".join(f"error, {n:,} steps" for n in AT) + " | layers | adherence after | seeds |",
        "|" + " --- |" * (len(AT) + 5),
    ]
    for sparsity in SPARSITIES:
        for row in ROWS:
            dense = row.startswith("dense")
            if dense and sparsity != 0.95:
                continue
            own = [(run, results[run.key]) for run in of_row(results, row, size, sparsity)]
            cells = []
            for step in AT:
                errors = [value["errors"][str(step)] for run, value in own if str(step) in value["errors"]
                          and (step == run.steps or (step < 1000 and run.steps == 250))]  # fmt: skip
                cells.append("" if row == UNTUNED and step else spread(errors, "{:.3f}"))
            layers = [value["layer_errors"] for run, value in own if run.steps == 250 and "layer_errors" in value]
            of_layers = " ".join(f"{statistics.mean(each):.2f}" for each in zip(*layers, strict=True))
            ends = []
            for steps in (0, 250, 1000):
                rates = [value["adherence"]["all"] for run, value in own if run.steps == steps]
                if rates:
                    ends.append(f"{steps:,}: {spread([100 * rate for rate in rates], '{:.0f}')} %")
            seeds = len({run.seed for run, _ in own})
            name = "" if dense else f"{100 * sparsity:.0f} %"
            cells = [row, name, *cells, of_layers, ", ".join(ends) or "not run", str(seeds or "")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def of_row(results: dict[str, dict], row: str, size: Size, sparsity: float) -> list[Run]:
    """The runs of a row that have results."""
    keys = [key.split("/") for key in results]
    return [Run(row, size, sparsity, int(seed), int(steps)) for name, of, share, seed, steps in keys
            if (name, of, share) == (row, str(size), f"{sparsity:g}")]  # fmt: skip


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "not run"
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"


def write_tables(results: dict[str, dict]) -> None:
    """Put the tables between their marks in weights/README.md."""
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    part = README.with_suffix(".md.part")
    part.write_text(before + MARKS[0] + tables(results) + MARKS[1] + after)
    os.replace(part, README)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[str(size) for size in SIZES], help="do only the runs at this size")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="start no further run after this many minutes"
    )
    parser.add_argument("--dtype", default="bf16", help="compute dtype (default: bf16)")
    parser.add_argument("--table", action="store_true", help="only rebuild the tables")
    args = parser.parse_args()
    began = time.monotonic()
    (WORK / "table").mkdir(parents=True, exist_ok=True)
    for run in [] if args.table else runs():
        if args.size in (None, str(run.size)) and time.monotonic() - began < 60 * args.limit:
            do(run, args.dtype)
    write_tables(read_results())
    print(tables(read_results()))


if __name__ == "__main__":
    main()
