"""Compare all attention methods at equal density on the bundled model: errors, prompt adherence, FLOPs and time.

    python scripts/methods_table.py                          measure every cell that has no result yet
    python scripts/methods_table.py --part attention         without videos: about a minute per cell
    python scripts/methods_table.py --size 128x128x17 --clips 16 --limit 60
    python scripts/methods_table.py --table                  print the table of the results so far

A cell is one method at one density, size and token order. It is measured in two parts. The part "attention" takes q, k
and v of every layer from three denoising steps of the dense model. It compares the method's output with dense attention
in float64, measures the softmax mass of the attended pairs, and times the method and dense attention alternately. The
part "clips" generates videos of held-out prompts with `slagen batch`, from the same noise as dense attention, and
checks what they show. Where a method has no option for its density, the option that it has is set so that it attends to
as many pairs. The controls are `random` blocks at equal density, and dense attention with another seed. Each result is
written to benchmarks/results/methods-table.json at once, with its machine; run the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "tiny_wan"))

from checker import check  # noqa: E402
from evaluate import held_out  # noqa: E402
from scenes import SIZES, Size  # noqa: E402

from slagen.attention import registry  # noqa: E402
from slagen.attention.delta.correction import corrected  # noqa: E402
from slagen.attention.delta.method import with_delta  # noqa: E402
from slagen.attention.mean.selection import kept_blocks  # noqa: E402
from slagen.attention.protocol import Grid, Inputs, Layer, Method, StepContext  # noqa: E402
from slagen.io.files import write_json  # noqa: E402
from slagen.machine import describe_device  # noqa: E402
from slagen.packages import versions  # noqa: E402
from slagen.video import read_mp4  # noqa: E402
from slagen.wan.loading import load_pipeline  # noqa: E402
from slagen.wan.models import resolve_model  # noqa: E402
from slagen.wan.processor import install_method, processors  # noqa: E402
from slagen.wan.samplers import set_sampler  # noqa: E402

WORK = ROOT / "build" / "methods-table"
RESULTS = ROOT / "benchmarks" / "results" / "methods-table.json"
DENSITIES = (0.05, 0.1, 0.2)
SEEDS = (1000, 2000, 3000)
ORDERS = ("raster", "cube")
BLOCKS = {"block_m": 16, "block_n": 16}
AT = (0.0, 0.5, 0.9)  # of the denoising, where q, k and v are captured
PROMPTS = 2  # whose q, k and v are captured
REPEATS = 7  # timed calls of each
DENSE = "dense"
OTHER_SEED = "dense, other seed"


@dataclass(frozen=True)
class Row:
    """A method with its options.

    Args:
        method: its name. options: fixed ones. knob: the option that decides the density, with the values at which it
            is lowest and highest; None where that is sparsity. complement: whether what is not attended exactly enters
            in another way. tuned: the row of sla_table.py whose weights it runs with. remembers: whether it remembers
            the steps of a clip, so that it runs in a model only.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    knob: tuple[str, float, float] | None = None
    complement: bool = False
    tuned: str | None = None
    remembers: bool = False

    @property
    def attention(self) -> Method:
        """The method, wrapped where its options say so."""
        return with_delta(registry.get(self.method), self.options.get("delta"))


ROWS = {
    "critical only": Row("sparse", BLOCKS),
    "critical only, by sub-block means": Row("sparse", {**BLOCKS, "selector": "subblock"}),
    "random blocks": Row("sparse", {**BLOCKS, "selector": "random"}),
    "critical only, delta": Row("sparse", {**BLOCKS, "delta": 64}),
    "mean": Row("mean", BLOCKS, complement=True),
    "sol": Row("sol", BLOCKS, knob=("tau", 4.0, -4.0), complement=True),
    "vsa": Row("vsa"),
    "nabla": Row("nabla", {"sliding_tile": "none"}, knob=("top_p", 0.0, 1.0)),
    "radial": Row("radial", BLOCKS, knob=("decay_factor", 0.0, 16.0)),
    "rettention": Row("rettention", knob=("window_fraction", 0.0, 1.0), remembers=True),
    "SLA, 250 steps": Row("sla", BLOCKS, complement=True, tuned="SLA all"),
    "SLA2, 250 steps": Row("sla2", BLOCKS, complement=True, tuned="SLA2"),
    "mean, 250 steps": Row("mean", BLOCKS, complement=True, tuned="block means"),
    "critical only, 250 steps": Row("sparse", BLOCKS, tuned="critical only"),
}


@dataclass(frozen=True)
class Cell:
    """One place of the table; of dense attention and of another seed, density is 1 and the order is raster."""

    row: str
    size: Size
    density: float
    order: str
    seed: int | None = None  # of the part "clips"

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.row, self.size, f"{self.density:g}", self.order, self.seed or "attention")))

    @property
    def name(self) -> str:
        """For folders."""
        return self.key.replace("/", "-").replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Captured:
    """q, k and v (1, H, L, D) of a layer in one pass."""

    layer: Layer
    grid: Grid
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def orders(row: Row) -> tuple[str, ...]:
    """The orders of tokens in which it runs; a method without the option has one of its own."""
    return ORDERS if "order" in registry.get(row.method).option_names else ("own",)


def cells(size: Size, part: str) -> Iterator[Cell]:
    """All cells of a part, those of one density together."""
    if part == "clips":
        for seed in SEEDS:
            yield Cell(DENSE, size, 1.0, "raster", seed)
    for seed in SEEDS if part == "clips" else (None,):
        for density in DENSITIES:
            for name, row in ROWS.items():
                for order in orders(row):
                    if part == "clips" or (row.tuned is None and not row.remembers):
                        yield Cell(name, size, density, order, seed)


def options_of(cell: Cell, value: float | None) -> dict[str, Any]:
    """The options of a cell's method; value is that of the knob."""
    row = ROWS[cell.row]
    chosen = {"sparsity": 1 - cell.density} if row.knob is None else {row.knob[0]: value}
    return {**row.options, **chosen, **({"order": cell.order} if cell.order in ORDERS else {})}


def capture(size: Size) -> list[Captured]:
    """q, k and v of every layer in the conditional passes of a dense run, kept as a file once made."""
    path = WORK / f"captured-{size}.pt"
    if path.exists():
        torch.serialization.add_safe_globals([Captured, Layer, Grid])
        return torch.load(path, weights_only=True)
    source = resolve_model("tiny-wan", "cpu")
    pipe = load_pipeline(source, torch.float32)
    set_sampler(pipe, source.defaults.sampler, source.defaults.flow_shift)
    dense = registry.get("dense")
    install_method(pipe.transformer, dense, dense.config())
    steps = [round(share * source.defaults.steps) for share in AT]
    grid = Grid((size.frames - 1) // 4 + 1, size.side // 16, size.side // 16)
    found, passes = list[Captured](), 0

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        q, k, v, inputs = args
        if passes % 2 == 0 and passes // 2 in steps:
            found.append(Captured(inputs.layer, grid, *(x.clone() for x in (q, k, v))))

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    for processor in processors(pipe.transformer):
        processor.register_forward_pre_hook(keep)
    pipe.transformer.register_forward_hook(count)
    _, prompts, seeds = held_out(PROMPTS)
    for prompt, seed in zip(prompts, seeds, strict=True):
        passes = 0
        pipe(
            prompt=prompt, height=size.side, width=size.side, num_frames=size.frames, output_type="latent",
            num_inference_steps=source.defaults.steps, guidance_scale=source.defaults.guidance_scale,
            max_sequence_length=source.defaults.max_sequence_length, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def attention_of(method: Method, config: Any, at: Captured) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    """What takes values (1, H, L, D), and gives the output of a method and the density it used."""
    context = StepContext()
    context.begin_pass(at.grid)
    module: Any = method.build(config, at.layer, method.backends[0].name, at.q.device)
    if hasattr(module, "begin_pass"):
        module.begin_pass(context)

    def attend(v: torch.Tensor) -> tuple[torch.Tensor, float]:
        o = corrected(module(at.q, at.k, v, Inputs(at.layer, context, kept={})), at.q, at.k, v, method.delta)
        taken = module.take_density() if hasattr(module, "take_density") else None
        return o, method.density(config, at.grid) if taken is None else taken

    return attend


def configured(method: Method, options: dict[str, Any], grid: Grid) -> Any:
    """The config of a method. Raises UsageError for an option that it does not have."""
    return method.configure(method.config(), {k: x for k, x in options.items() if k != "delta"}, grid)


def find_knob(cell: Cell, captured: list[Captured]) -> float | None:
    """The value of a row's knob with which it has the cell's density on the captured tensors, by bisection."""
    row = ROWS[cell.row]
    if row.knob is None:
        return None
    method, (_, low, high) = row.attention, row.knob
    some = captured[:: max(1, len(captured) // 12)]
    for _ in range(12):
        value = (low + high) / 2
        densities = []
        for at in some:
            attend = attention_of(method, configured(method, options_of(cell, value), at.grid), at)
            densities.append(attend(at.v)[1])
        if statistics.mean(densities) < cell.density:
            low = value
        else:
            high = value
    return (low + high) / 2


def kept_mass(row: Row, config: Any, at: Captured) -> float | None:
    """The mean share of dense attention's weights that lies on pairs attended exactly; None where that is not known."""
    weights = torch.softmax(at.q.double() @ at.k.double().mT * at.q.shape[3] ** -0.5, -1)
    if row.method in ("mean", "sol"):
        kept = kept_blocks(at.q, at.k, config)
        pairs = kept.repeat_interleave(config.block_m, 2).repeat_interleave(config.block_n, 3)
        pairs = pairs[:, :, : at.q.shape[2], : at.q.shape[2]]
    elif row.complement or "delta" in row.options:
        return None
    else:
        pairs = torch.zeros_like(weights, dtype=torch.bool)
        attend, width = attention_of(row.attention, config, at), at.q.shape[3]
        for first in range(0, at.q.shape[2], width):  # one key for each column of v: the output is that key's weight
            v = torch.zeros_like(at.v)
            count = min(width, at.q.shape[2] - first)
            v[:, :, first : first + count, :count] = torch.eye(count)
            pairs[..., first : first + count] = attend(v)[0][..., :count] > 0
    return (weights * pairs).sum(-1).mean().item()


@torch.inference_mode()
def measure_attention(cell: Cell, captured: list[Captured]) -> dict[str, Any]:
    """A method on the captured tensors: error by layer, density, kept mass, and time beside dense attention."""
    row, value = ROWS[cell.row], find_knob(cell, captured)
    method = row.attention
    config = configured(method, options_of(cell, value), captured[0].grid)
    layers = captured[0].layer.count
    squares, densities, masses = torch.zeros(2, layers, dtype=torch.float64), list[float](), list[float]()
    for at in captured:
        o, density = attention_of(method, config, at)(at.v)
        exact = F.scaled_dot_product_attention(at.q.double(), at.k.double(), at.v.double())
        squares[:, at.layer.index] += torch.stack([(o - exact).square().sum(), exact.square().sum()])
        densities.append(density)
        mass = kept_mass(row, config, at)
        masses += [] if mass is None else [mass]
    times = {"dense": list[float](), "own": list[float]()}
    for at in captured[:layers]:
        attend = attention_of(method, config, at)
        calls = {"dense": lambda at=at: F.scaled_dot_product_attention(at.q, at.k, at.v),
                 "own": lambda at=at, attend=attend: attend(at.v)}  # fmt: skip
        for repeat in range(REPEATS + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if repeat:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {
        "options": options_of(cell, value),
        "layer_errors": (squares[0] / squares[1]).sqrt().tolist(),
        "error": (squares[0].sum() / squares[1].sum()).sqrt().item(),
        "density": statistics.mean(densities),
        "kept_mass": statistics.mean(masses) if masses else None,
        "attention_ms": quartiles(times["own"]), "dense_ms": quartiles(times["dense"]),
    }  # fmt: skip


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def measure_clips(cell: Cell, results: dict[str, Any], count: int) -> dict[str, Any] | str:
    """A method's videos of held-out prompts: what is right, and how far the latents are from dense attention's.

    Returns: a reason, where that must wait for another cell.
    """
    folder, command = WORK / cell.name, ["--attention", DENSE]
    if cell.row != DENSE:
        row, value = ROWS[cell.row], None
        if row.remembers:
            value = cell.density
        elif row.knob is not None:
            known = results.get(Cell(cell.row, cell.size, cell.density, cell.order).key)
            if known is None:
                return "it needs the result of --part attention, which has not run yet"
            value = known["options"][row.knob[0]]
        command = ["--attention", row.method]
        for name, given in options_of(cell, value).items():
            command += [f"--{name.replace('_', '-')}", str(given)]
        if row.tuned is not None:
            from sla_table import Run

            weights = Run(row.tuned, cell.size, round(1 - cell.density, 4), 0, 250).folder / "sla.safetensors"
            if not weights.exists():
                return "its weights are missing. Run scripts/tiny_wan/sla_table.py first."
            command += ["--weights", str(weights), "--allow-untrained"]
    scenes, prompts, seeds = held_out(count, cell.seed or 0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{prompt} --seed {seed} --id {i:03d}" for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "slagen", "batch", str(folder / "prompts.txt"), "--model", "tiny-wan", *command,
               "--size", f"{cell.size.side}x{cell.size.side}", "--num-frames", str(cell.size.frames), "--save-latents",
               "--output", str(folder / "clips")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    reports = [json.loads(next((folder / "clips").glob(f"{i:03d}*.json")).read_text()) for i in range(count)]
    videos = [folder / "clips" / report["video"]["file"] for report in reports]
    right = [check(read_mp4(video)).right(scene)["all"] for video, scene in zip(videos, scenes, strict=True)]
    latents = [load_file(video.with_suffix(".latents.safetensors"))["latents"].float() for video in videos]
    result = {
        "right": right, "options": command[command.index("--attention") :],
        "density": statistics.mean(report["attention"].get("density", 1.0) for report in reports),
        "attention_tflop": reports[0]["cost"]["attention_tflop"],
        "flops_speedup": reports[0]["cost"]["flops_speedup"],
        "denoise_s": quartiles([report["stages_s"]["denoise"] for report in reports]),
    }  # fmt: skip
    if cell.row != DENSE:
        result["errors"] = errors_to_dense(latents, cell, count)
    elif cell.seed != SEEDS[0]:  # the same prompts with other noise
        first = Cell(DENSE, cell.size, 1.0, "raster", SEEDS[0])
        result["errors"] = errors_to_dense(latents, first, count)
    return result


def errors_to_dense(latents: list[torch.Tensor], cell: Cell, count: int) -> list[float]:
    """The relative L2 distance of each clip's latents to those of dense attention of the cell's seed."""
    folder = WORK / Cell(DENSE, cell.size, 1.0, "raster", cell.seed).name / "clips"
    dense = [load_file(next(folder.glob(f"{i:03d}*.latents.safetensors")))["latents"].float() for i in range(count)]
    return [((a - b).norm() / b.norm()).item() for a, b in zip(latents, dense, strict=True)]


def read_results() -> dict[str, Any]:
    """Results by key of the cell."""
    return json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else {}


def add_result(cell: Cell, result: dict[str, Any]) -> None:
    about = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
             "device": describe_device(torch.device("cpu")).to_dict()}  # fmt: skip
    found = {**read_results(), cell.key: {**result, **about}}
    write_json(RESULTS, {"about": __doc__.splitlines()[0], "cells": found})


def interval(values: list[float]) -> str:
    """The mean, and where 95 % of the means of as many values drawn from them lie."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (4000, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"


def table(results: dict[str, Any], size: Size) -> str:
    """The results at one size as Markdown. Intervals are of 95 %, by bootstrap over clips; those of "right less
    dense" are paired."""
    lines = [
        "| method | order | density | attention error | kept mass | dense time / its time | clips' error | right |"
        " right less dense, points | FLOPs of attention, % of dense |",
        "|" + " --- |" * 10,
    ]
    dense = {seed: results.get(Cell(DENSE, size, 1.0, "raster", seed).key) for seed in SEEDS}
    of_dense = [value for value in dense.values() if value]
    if of_dense:
        rights = [100 * right for value in of_dense for right in value["right"]]
        lines.append(f"| {DENSE} | raster | 1.00 |  |  |  | 0 | {np.mean(rights):.0f} % | 0 | 100 |")
        others = [error for value in of_dense for error in value.get("errors", [])]
        cell = interval(others) if others else "not run"
        lines.append(f"| {OTHER_SEED} | raster | 1.00 |  |  |  | {cell} |  |  |  |")
    for density in DENSITIES:
        for name, row in ROWS.items():
            for order in orders(row):
                lines.append(line(results, dense, Cell(name, size, density, order)))
    return "\n".join(lines) + "\n"


def line(results: dict[str, Any], dense: dict[int, Any], cell: Cell) -> str:
    """One row of the table."""
    attention = results.get(cell.key)
    start = ["" if ROWS[cell.row].tuned or ROWS[cell.row].remembers else "not run"] * 3
    density = f"{cell.density:.2f}"
    if attention is not None:
        mass = attention["kept_mass"]
        start = [f"{attention['error']:.3f}", "" if mass is None else f"{mass:.2f}",
                 f"{attention['dense_ms']['median'] / attention['attention_ms']['median']:.1f}"]  # fmt: skip
        density = f"{attention['density']:.3f}"
    keys = {seed: Cell(cell.row, cell.size, cell.density, cell.order, seed).key for seed in SEEDS}
    pairs = [(results[key], dense[seed]) for seed, key in keys.items() if key in results and dense[seed]]
    end = ["not run"] * 4
    if pairs:
        errors = [error for own, _ in pairs for error in own["errors"]]
        rights = [100 * right for own, _ in pairs for right in own["right"]]
        less = [100.0 * (a - b) for own, full in pairs for a, b in zip(own["right"], full["right"], strict=False)]
        share = 100 * pairs[0][0]["attention_tflop"] / pairs[0][1]["attention_tflop"]
        end = [interval(errors), f"{np.mean(rights):.0f} %", interval(less), f"{share:.0f}"]
    return f"| {' | '.join([cell.row, cell.order, density, *start, *end])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("attention", "clips"), help="measure only this part")
    parser.add_argument("--size", choices=[str(size) for size in SIZES], default=str(SIZES[-1]))
    parser.add_argument("--row", nargs="+", choices=[*ROWS, DENSE], help="measure only these methods")
    parser.add_argument("--density", nargs="+", type=float, choices=DENSITIES, help="measure only these densities")
    parser.add_argument("--clips", type=int, default=64, help="prompts per cell (default: 64)")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="start no further cell after this many minutes"
    )
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    args = parser.parse_args()
    size = next(size for size in SIZES if str(size) == args.size)
    began, captured = time.monotonic(), None
    for part in () if args.table else ("attention", "clips") if args.part is None else (args.part,):
        for cell in cells(size, part):
            wanted = (args.row is None or cell.row in (*args.row, DENSE)) and (
                args.density is None or cell.density in (*args.density, 1.0)
            )
            if not wanted or cell.key in read_results() or time.monotonic() - began > 60 * args.limit:
                continue
            print(cell.key, flush=True)
            if part == "attention":
                captured = captured or capture(size)
                result: dict[str, Any] | str = measure_attention(cell, captured)
            else:
                result = measure_clips(cell, read_results(), args.clips)
            if isinstance(result, str):
                print(f"  not run: {result}", flush=True)
            else:
                add_result(cell, result)
    print(table(read_results(), size))


if __name__ == "__main__":
    main()
