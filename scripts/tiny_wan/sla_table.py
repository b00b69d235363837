"""Ways to tune by `slagen finetune`, compared as weights/README.md shows: the paper's tables in small.

    python scripts/tiny_wan/sla_table.py             every run that has no result yet, the most telling first
    python scripts/tiny_wan/sla_table.py --limit 60  none that is begun after 60 minutes
    python scripts/tiny_wan/sla_table.py --table     only the table, from the results there are

Runs go on where they were stopped, and the same command started twice shares the runs: on few cores, one process on
each core (OMP_NUM_THREADS=1 taskset -c K) does more than one process on all. Each cell is written to
benchmarks/results/tiny-wan-sla-table.json as it is done, with its machine, and the table in weights/README.md is made
anew from that file.
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

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "tiny-wan"
RESULTS = ROOT / "benchmarks" / "results" / "tiny-wan-sla-table.json"
README = ROOT / "weights" / "README.md"
MARKS = ("<!-- sla table -->\n", "<!-- end of sla table -->\n")
UNTUNED = "critical only, not tuned"
ROWS = {  # name in the table -> what slagen finetune is told
    UNTUNED: [],
    "critical only": ["--attention", "sparse"],
    "linear only": ["--attention", "linear"],
    "SLA all": ["--attention", "sla", "--linear-domain", "all"],
    "SLA marginal, 10 % negligible": ["--attention", "sla", "--linear-domain", "marginal", "--negligible", "0.1"],
    "dense, tuned as long": ["--attention", "dense", "--loss", "flow"],
}
AT = (0, 50, 250, 1000)  # steps that have a column
NUM_CLIPS = 64  # that adherence is measured on


@dataclass(frozen=True)
class Run:
    """One training of a row."""

    row: str
    sparsity: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.row}/{self.sparsity:g}/{self.seed}/{self.steps}"

    @property
    def folder(self) -> Path:
        return WORK / "table" / self.key.replace("/", "-").replace(" ", "-").replace(",", "").replace("%", "percent")


def runs() -> list[Run]:
    """All of them, the most telling first. 95 % keeps 1 of the 20 key blocks, which is the least there is."""
    both, tuned = ("SLA all", "critical only"), [row for row in ROWS if row != UNTUNED]
    wanted = [Run(row, 0.95, 0, 250) for row in tuned] + [Run(UNTUNED, 0.95, 0, 0)]
    wanted += [Run(row, 0.95, 0, 1000) for row in both]
    wanted += [Run(row, 0.9, 0, 250) for row in tuned if not row.startswith("dense")] + [Run(UNTUNED, 0.9, 0, 0)]
    wanted += [Run(row, 0.95, seed, 250) for seed in (1, 2) for row in tuned]
    return wanted


def train(run: Run, data: Path, dtype: str) -> dict:
    """One `slagen finetune`; returns its result."""
    command = [sys.executable, "-m", "slagen", "finetune", "--model", "tiny-wan", "--from-dense", "--data", str(data)]
    every = "50" if run.steps <= 250 else "250"
    command += [*ROWS[run.row], "--seed", str(run.seed), "--steps", str(run.steps), "--validate-every", every, "--json"]
    command += ["--dtype", dtype, "--output", str(run.folder)]
    if not run.row.startswith("dense"):
        command += ["--sparsity", str(run.sparsity)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def adherence(run: Run) -> dict:
    """How many held-out prompts a run's weights get right, with the latents' distance to the dense model's."""
    import torch
    from checker import check
    from common import save_tensors
    from diffusers import WanPipeline
    from evaluate import ATTRIBUTES, held_out, sample

    from slagen.attention.sla.config import SLAConfig
    from slagen.formats.transformer import read_checkpoint
    from slagen.machine import describe_device
    from slagen.wan.install import apply_sla, load_sla
    from slagen.wan.loading import load_pipeline
    from slagen.wan.models import resolve_model
    from slagen.wan.samplers import set_sampler
    from slagen.wan.vae import decode_latents

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model("tiny-wan", device.type)
    scenes, prompts, seeds = held_out(NUM_CLIPS)

    def latents(prepare) -> tuple[torch.Tensor, WanPipeline]:
        pipe = load_pipeline(source, device, torch.bfloat16)
        set_sampler(pipe, source.defaults.sampler, source.defaults.flow_shift)
        prepare(pipe)
        return sample(pipe, prompts, seeds, source.defaults, source.defaults.steps), pipe

    def tuned(pipe) -> None:
        if run.row == UNTUNED:
            apply_sla(pipe, SLAConfig(run.sparsity, block_m=16, block_n=16), branches="sparse")
        elif run.row.startswith("dense"):
            checkpoint = read_checkpoint(run.folder / "transformer.safetensors", torch.bfloat16)
            pipe.transformer.load_state_dict(checkpoint.tensors)
        else:
            branches = {"critical only": "sparse", "linear only": "linear"}.get(run.row, "both")
            load_sla(pipe, run.folder / "sla.safetensors", branches=branches, allow_untrained=True)

    kept = WORK / "table" / "dense-latents.pt"
    if not kept.exists():
        save_tensors(kept, latents(lambda pipe: None)[0])
    dense = torch.load(kept, weights_only=True)
    found, pipe = latents(tuned)
    with torch.inference_mode():
        clips = [decode_latents(pipe.vae, z[None]).numpy() for z in found]
    right = [check(clip).right(scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {
        "clips": NUM_CLIPS, **{a: sum(r[a] for r in right) / len(right) for a in ATTRIBUTES},
        "latents_error_to_dense": ((found - dense).norm() / dense.norm()).item(),
        "device": describe_device(device).to_dict(),
    }  # fmt: skip


def read_results() -> dict[str, dict]:
    """Results by key of the run."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def add_result(run: Run, result: dict) -> None:
    """Put a run's result into the file and the table, beside those of other processes."""
    from slagen.io.files import write_json
    from slagen.packages import versions

    with FileLock(WORK / "table" / "results.lock"):
        now = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
        results = {**read_results(), run.key: {**result, **now}}
        write_json(RESULTS, {"about": __doc__.splitlines()[0], "runs": results})
        write_table(results)


def do(run: Run, data: Path, dtype: str) -> None:
    """Train and measure, unless that is done or another process is at it."""
    try:
        with FileLock(WORK / "table" / f"{run.folder.name}.lock", timeout=0):
            if run.key in read_results():
                return
            print(run.key, flush=True)
            if run.row == UNTUNED:
                before = read_results().get(Run("critical only", run.sparsity, 0, 250).key)
                if before is None:
                    print(
                        f"{run.key}: another process is at the row that it begins like; start again later", flush=True
                    )
                    return
                add_result(run, {"errors": {"0": before["errors"]["0"]}, "dtype": dtype, "adherence": adherence(run)})
                return
            told = train(run, data, dtype)
            log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
            errors = {str(line["step"]): line["error"] for line in log if line["event"] == "validation"}
            errors[str(run.steps)] = told["teacher_error_after"]
            result = {"errors": errors, "seconds": told["seconds"], "dtype": dtype, "adherence": adherence(run)}
            add_result(run, result)
    except Timeout:
        print(f"{run.key}: another process is at it", flush=True)


def table(results: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| row | sparsity | " + " | ".join(f"error, {n:,} steps" for n in AT) + " | adherence after | seeds |",
        "|" + " --- |" * (len(AT) + 4),
    ]
    for sparsity in (0.9, 0.95):
        for row in ROWS:
            dense = row.startswith("dense")
            if dense and sparsity == 0.9:
                continue
            own = [
                (Run(row, sparsity, int(key.split("/")[2]), int(key.split("/")[3])), value)
                for key, value in results.items() if key.startswith(f"{row}/{sparsity:g}/")
            ]  # fmt: skip
            cells = []
            for step in AT:
                errors = [value["errors"][str(step)] for run, value in own if str(step) in value["errors"]
                          and (step == run.steps or (step < 1000 and run.steps == 250))]  # fmt: skip
                cells.append("" if row == UNTUNED and step else spread(errors, "{:.3f}"))
            ends = []
            for steps in (0, 250, 1000):
                rates = [value["adherence"]["all"] for run, value in own if run.steps == steps and "adherence" in value]
                if rates:
                    ends.append(f"{steps:,}: {spread([100 * rate for rate in rates], '{:.0f}')} %")
            seeds = len({run.seed for run, _ in own})
            name = "" if dense else f"{100 * sparsity:.0f} %"
            lines.append(f"| {row} | {name} | {' | '.join(cells)} | {', '.join(ends) or 'not run'} | {seeds or ''} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "not run"
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"


def write_table(results: dict[str, dict]) -> None:
    """Put the table between its marks in weights/README.md."""
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    part = README.with_suffix(".md.part")
    part.write_text(before + MARKS[0] + table(results) + MARKS[1] + after)
    os.replace(part, README)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=float("inf"), help="minutes after which no run is begun")
    parser.add_argument("--dtype", default="bf16", help="to compute in")
    parser.add_argument("--table", action="store_true", help="only make the table anew")
    args = parser.parse_args()
    began = time.monotonic()
    if not args.table:
        from tune import prepare_data

        with FileLock(WORK / "data.lock"):
            data = prepare_data(WORK, ROOT / "weights" / "tiny-wan")
        for run in runs():
            if time.monotonic() - began < 60 * args.limit:
                do(run, data, args.dtype)
    write_table(read_results())
    print(table(read_results()))


if __name__ == "__main__":
    main()
