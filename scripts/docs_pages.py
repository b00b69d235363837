"""Write those parts of README and docs/ that come from the code and from the measurements: options, names, numbers.

    python scripts/docs_pages.py            rewrite them
    python scripts/docs_pages.py --check    say which are out of date; exit code 1 if any is

A page has them between the lines `<!-- made by scripts/docs_pages.py: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import typer.core

import slagen
from slagen.cli.app import app
from slagen.generation import peers
from slagen.generation.config import GenerateConfig
from slagen.generation.estimate import plan
from slagen.generation.memory import GIB
from slagen.generation.offload import choose, of_published
from slagen.io.text import counted
from slagen.wan.caches import CACHES
from slagen.wan.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("circle", "square", "triangle", "star")  # that the bundled model draws
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- made by scripts/docs_pages\.py: ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def command_line() -> str:
    """Every command with its arguments and options, as its help has them."""
    return "\n".join(line for name, command in commands(typer.main.get_command(app)) for line in help_of(name, command))


def commands(command: typer.core.TyperCommand, name: str = "slagen") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """A command and those below it, with the words that call each."""
    yield name, command
    for sub, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {sub}")


def help_of(name: str, command: typer.core.TyperCommand) -> Iterator[str]:
    """The lines of a command's section."""
    context = typer.Context(command, info_name=name)
    yield f"## {name}\n"
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("Example: "):
            yield f"```bash\n{text.removeprefix('Example: ')}\n```\n"
        else:
            yield f"{plain(text)}\n"
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or default
            text = " ".join(record[1].split())
            panels.setdefault(panel, []).append(f"- `{record[0]}`: {plain(text)}")
    for panel, rows in panels.items():
        yield f"**{panel}**\n"
        yield from rows
        yield ""


def plain(text: str) -> str:
    """Text of a help as Markdown: what Markdown would take for its own signs is escaped."""
    return re.sub(r"([<>*_\[\]])", r"\\\1", text)


def names() -> str:
    """Other tools' names for slagen's options."""
    return table(("their option", "slagen's option"), rows_by_ours({**peers.NAMES}))


def trainer_names() -> str:
    """The same of trainers, in `slagen finetune`."""
    return table(("their option", "slagen's option"), rows_by_ours({**peers.TRAINER_NAMES}))


def rows_by_ours(found: dict[str, str]) -> list[tuple[str, str]]:
    ours: dict[str, list[str]] = {}
    for theirs, name in found.items():
        ours.setdefault(name, []).append(f"`--{theirs.replace('-', '_')}`")
    return [(", ".join(theirs), f"`--{name}`") for name, theirs in sorted(ours.items())]


def values() -> str:
    """Other tools' values that slagen understands."""
    ours: dict[tuple[str, str], list[str]] = {}
    spelling = {"attention-backend": "attention", "sampler": "sampler", "dtype": "dtype"}
    for option, name in spelling.items():
        for theirs, value in peers.VALUES[option].items():
            ours.setdefault((name, value), []).append(f"`{theirs}`")
    rows = [(", ".join(theirs), f"`--{name} {value}`") for (name, value), theirs in ours.items()]
    return table(("their value", "slagen's"), rows)


def refused() -> str:
    """Other tools' options that slagen does not have, with the reason."""
    return table(("their options", "what slagen says"), rows_by_reason(peers.REFUSED))


def trainer_refused() -> str:
    """The same of trainers."""
    return table(("their options", "what slagen finetune says"), rows_by_reason(peers.TRAINER_REFUSED))


def rows_by_reason(found: dict[str, str]) -> list[tuple[str, str]]:
    reasons: dict[str, list[str]] = {}
    for theirs, reason in found.items():
        reasons.setdefault(reason, []).append(f"`--{theirs.replace('-', '_')}`")
    return [(", ".join(theirs), plain(reason)) for reason, theirs in reasons.items()]


def options_of(name: str) -> str:
    """The options of an attention method with their defaults, and its backends."""
    method = next(each for each in slagen.methods() if each["name"] == name)
    needs = "yes" if method["needs_training"] else "no"
    lines = [f"Training needed: {needs}. Backends: {', '.join(f'`{b}`' for b in method['backends'])}.", ""]
    for option, value in method["options"].items():
        flag = f"--{option.replace('_', '-')}"
        help = method["flags"].get(flag) or SHARED.get(option, "")
        lines.append(f"- `{flag}`, default {shown(value)}{f': {plain(help)}' if help else ''}")
    return "\n".join(lines) + "\n"


SHARED = {
    "sparsity": "Fraction of key blocks that are not attended exactly.",
    "block_m": "Query rows per block.",
    "block_n": "Key columns per block.",
    "negligible": "Fraction of key blocks that neither the exact nor the linear branch attends to.",
    "linear_domain": "Key blocks that the linear branch attends to: all, or marginal (neither exact nor negligible).",
    "feature_map": "Feature map of the linear branch: softmax, elu or relu.",
}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "as trained" if value is None else f"`{'x'.join(map(str, value)) if isinstance(value, tuple) else value}`"


def methods() -> str:
    """The attention methods in one table, with what each costs on Wan2.1-1.3B at 480p, as `slagen plan` computes it."""
    rows = []
    for each in slagen.methods():
        if each["kind"] == "method":
            rows.append((f"`{each['name']}`", *["yes" if each[need] else "no" for need in NEEDS], cost_of(each)))
    return table(("method", "needs training", "needs weights", "attention FLOPs, of dense"), rows)


def cost_of(method: dict[str, Any]) -> str:
    """A method's FLOPs of attention on Wan2.1-1.3B at 480p, in percent of those of dense attention."""
    if method["name"] == "dense":
        return "100 %"
    config = GenerateConfig(
        "a", model="wan2.1-t2v-1.3b", width=832, height=480, num_frames=81, attention=method["name"],
        dense_steps="0%", dense_layers="0%", allow_untrained=method["needs_weights"],
    )  # fmt: skip
    flops = plan(config, device="cpu").to_dict()["flops"]
    return f"{100 * flops['sla_attention'] / flops['dense_attention']:.0f} %"


NEEDS = ("needs_training", "needs_weights")


def memory() -> str:
    """What a video of each preset takes, as `slagen plan` computes it."""
    rows = []
    for model, size, attention in PLANNED:
        width, height = map(int, size.split("x"))
        config = GenerateConfig("a", model=model, width=width, height=height, num_frames=81, attention=attention)
        found = plan(config, device="cpu").to_dict()
        gpu = found["memory_gib"]
        rows.append((f"`{model}`", f"{size}, 81 frames", f"{found['tokens']:,}",
                     f"{gpu['gpu_peak_all_resident']:.0f} GiB", f"{gpu['gpu_peak_offloaded']:.0f} GiB",
                     f"{sum(part['gib'] for part in found['downloads']):.0f} GiB"))  # fmt: skip
    return table(("model", "video", "tokens", "GPU memory", "with offload", "download"), rows)


CARDS = (8, 12, 24, 48, 80, 141)  # GB


def placements() -> str:
    """What --offload auto and --vae-tiling auto choose on an empty card, half a GiB of which is taken."""
    rows = []
    for card in CARDS:
        for model in ("1.3b", "14b"):
            for size in ("832x480", "1280x720"):
                width, height = map(int, size.split("x"))
                sizes = of_published(PRESETS[f"wan2.1-t2v-{model}"].shape, (width, height, 81))
                found = choose(sizes, int((card - 0.5) * GIB))
                need = found.reason.partition(") takes ")[2]
                rows.append((f"{card} GB", f"{model.upper()}, {size}", found.offload, "on" if found.tiling else "off",
                             need.partition(", and ")[0] + ", not enough" * ("may not be" in need)))  # fmt: skip
    return table(("card", "model, video", "offload", "VAE tiling", "at most"), rows)


SKIPS = {
    "first-block": "all other blocks, where the first one's residual has changed by less than `threshold`",
    "mag": "a pass, where the ratios by which residuals grow keep the error that adds up under `threshold`",
    "sea": "a pass, where the filtered latents have changed by less than `threshold` since the last one that ran",
    "taylorseer": "passes between every `cache_interval`-th one, whose result is extrapolated",
}


def caches() -> str:
    """The caches of --cache with their parameters."""
    rows = []
    for name, parameters in CACHES.items():
        given = [key if each.default is None else f"{key}={each.default:g}" for key, each in parameters.items()]
        rows.append((f"`{name}`", SKIPS[name], ", ".join(f"`{text}`" for text in given + ["ratios"] * (name == "mag"))))
    return table(("cache", "skips", "parameters with their defaults"), rows)


PLANNED = (
    ("turbowan2.1-t2v-1.3b-480p", "832x480", "sla"), ("wan2.1-t2v-1.3b", "832x480", "sol"),
    ("wan2.1-t2v-14b", "832x480", "sol"), ("wan2.1-t2v-14b", "1280x720", "sol"),
)  # fmt: skip


def tuning_curves() -> str:
    """The error to dense attention while tiny-wan is fine-tuned, and which prompts are right at the end."""
    runs = json.loads((RESULTS / "tiny-wan-sla-table-until-2026-11-30.json").read_text(encoding="utf-8"))["runs"]
    long = {key.split("/")[0]: run for key, run in runs.items() if key.endswith("/0.95/0/1000")}
    steps = list(next(iter(long.values()))["errors"])
    rows = []
    for name, run in sorted(long.items(), reverse=True):
        errors = [f"{run['errors'][step]:.3f}" for step in steps]
        rows.append((name, *errors, f"{100 * run['adherence']['all']:.0f} %"))
    return table(("trained", *[f"step {step}" for step in steps], "prompts right"), rows)


def short_curves() -> str:
    """The same over 250 steps, for every branch, at 95 %: the mean of three seeds."""
    runs = json.loads((RESULTS / "tiny-wan-sla-table-until-2026-11-30.json").read_text(encoding="utf-8"))["runs"]
    rows, steps = [], ["0", "50", "100", "150", "200", "250"]
    for name in dict.fromkeys(key.split("/")[0] for key in runs):
        found = [runs[key] for seed in range(3) if (key := f"{name}/128x128x17/0.95/{seed}/250") in runs]
        if len(found) == 3:
            errors = [f"{statistics.mean(run['errors'][step] for run in found):.3f}" for step in steps]
            right = 100 * statistics.mean(run["adherence"]["all"] for run in found)
            rows.append((name, *errors, f"{right:.0f} %"))
    return table(("trained", *[f"step {step}" for step in steps], "prompts right"), rows)


def quality() -> str:
    """How many held-out prompts the bundled model gets right."""
    head = ("row", "prompts", "colour", "shape", "motion", "background", "all four", *SHAPES, "error to dense")
    parts = []
    for path in sorted(RESULTS.glob("tiny-wan-quality-*.json")):
        found = read(path.name)
        rows = []
        for row in found["rows"]:
            rates = [
                *map(row.get, ("colour", "shape", "motion", "background", "all")),
                *map(row["by_shape"].get, SHAPES),
            ]
            error = "" if row["error_to_dense"] is None else f"{row['error_to_dense']:.3f}"
            rows.append((row["row"], str(row["clips"]), *[f"{100 * rate:.0f} %" for rate in rates], error))
        parts.append(f"At {found['size']}, " + about(found, path.name) + table(head, rows))
    return "\n".join(parts)


def attention_cpu() -> str:
    """Times of one layer of Wan2.1-1.3B on CPUs."""
    parts = []
    for path in sorted(RESULTS.glob("attention-cpu-*.json")):
        found = read(path.name)
        rows = []
        for row in found["rows"]:
            own, dense = statistics.median(row["slagen_s"]), statistics.median(row["dense_s"])
            rows.append((f"{row['length']:,}", f"{own:.2f} s", f"{dense:.1f} s", f"{row['speedup']:.1f}x",
                         f"{row['extra_memory_gib']:.2f} GiB"))  # fmt: skip
        parts.append(about(found, path.name) + table(("tokens", "SLA", "dense", "ratio", "extra memory"), rows))
    return "\n".join(parts)


def whole_commands() -> str:
    """Wall time of whole commands with the bundled model."""
    start, whole = read("startup-cpu-2026-11-25.json"), read("commands-cpu-2026-11-22.json")
    rows = [(row["what"], str(row["runs"]), f"{row['after_s']:.2f} s") for row in start["rows"]]
    text = about(start, "startup-cpu-2026-11-25.json") + table(("what", "runs", "median"), rows)
    rows = []
    for part in (whole["generate"], whole["finetune"]):
        seconds = part.get("median_s", part["wall_s"])
        peak = f"{max(part['peak_memory_gib']):.2f} GiB" if "peak_memory_gib" in part else "not measured"
        rows.append((f"`slagen {part['command'].split()[1]}`, as the file says", f"{seconds:.1f} s", peak))
    return text + "\n" + about(whole, "commands-cpu-2026-11-22.json") + table(("command", "time", "peak memory"), rows)


def verified_on() -> str:
    """The machines whose self-test somebody sent."""
    rows = []
    for path in sorted((RESULTS / "selftest").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine, checks = found["machine"], found["checks"]
        good = sum(check["status"] == "ok" for check in checks)
        packages = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "triton", "diffusers"))
        rows.append((machine["cpu"], machine["name"] if machine["type"] == "cuda" else "none", packages,
                     "bundled", f"{good} of {len(checks)} ok", found["date"][:10], f"`{path.name}`"))  # fmt: skip
    head = ("machine", "card", "packages", "weights", "`slagen doctor --selftest`", "date", "file")
    return table(head, rows) if rows else "No machine yet.\n"


def read(name: str) -> dict[str, Any]:
    return {"file": name, **json.loads((RESULTS / name).read_text(encoding="utf-8"))}


def about(found: dict[str, Any], name: str = "") -> str:
    """One line: the file of a measurement, its machine and date."""
    machine = found.get("machine") or found.get("device")
    date = found.get("date") or machine["date"]
    cores = machine.get("threads") or machine.get("cores")
    return f"`{name or found['file']}`: {machine['cpu']}, {counted(cores, 'core')}, {date[:10]}.\n\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


MADE: dict[str, Callable[[], str]] = {
    "command line": command_line, "names": names, "trainer names": trainer_names, "values": values,
    "refused": refused, "trainer refused": trainer_refused, "tuning curves": tuning_curves,
    "short curves": short_curves, "quality": quality, "attention cpu": attention_cpu,
    "whole commands": whole_commands, "verified on": verified_on, "methods": methods, "memory": memory,
    "placements": placements, "caches": caches,
}  # fmt: skip


def made(name: str) -> str:
    """The text of a part. Raises KeyError for one that there is not."""
    if name.startswith("options "):
        return options_of(name.removeprefix("options "))
    return MADE[name]()


def renewed(text: str) -> str:
    """A page with every part as it is now."""
    return PART.sub(lambda part: f"{part[1]}\n{made(part[2]).rstrip()}\n\n{part[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    check, old = parser.parse_args().check, []
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            old.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{path.relative_to(ROOT)} {'is out of date' if check else 'is renewed'}" for path in old))
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
