"""What `models`, `methods` and `info` print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slagen.cli.console import write_json, write_table
from slagen.cli.table import Cell, Table
from slagen.generation.peers import SET_IN_TRAINING
from slagen.io.text import counted, line

if TYPE_CHECKING:
    from slagen.generation.latents import LatentsInfo
    from slagen.generation.provenance import Made
    from slagen.generation.run_estimate import ListedModel
    from slagen.wan.info import Info


def show_models(rows: list[ListedModel], as_json: bool) -> None:
    """Print the presets: a table on stdout, or JSON alone."""
    if as_json:
        write_json([row.to_dict() for row in rows])
        return
    from slagen.wan.presets import recommended_policy

    table = Table()
    for row in rows:
        sampler = f"{counted(row.steps, 'step')} of {row.sampler}"
        sampler += "" if row.flow_shift is None else f", shift {row.flow_shift:g}"
        sla = row.sla
        said = [f"{row.size}, {counted(row.num_frames, 'frame')}", f"{sampler}, guidance {row.guidance_scale:g}"]
        if row.takes_image:
            said.append("begins with an image, given with --image")
        if sla is not None:
            said.append(f"SLA trained at sparsity {sla.sparsity:g}, blocks {sla.block_m}x{sla.block_n}")
        if row.recommended_attention is not None:
            policy = recommended_policy(row.name, row.recommended_attention)
            said.append(f"recommended: --attention {row.recommended_attention}, which needs no training")
            said.append(f"defaults for it: --dense-steps {policy.dense_steps} --dense-layers {policy.dense_layers}")
        said.append(f"from {row.weights or row.base or 'the installed package'}")
        table.add_row(row.name, Cell("\n".join(map(line, said))))
    write_table(table)


def show_methods(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the attention methods: a table on stdout, or JSON alone."""
    if as_json:
        write_json(rows)
        return
    table = Table()
    for row in rows:
        known = {"needs_training": "fine-tuning", "needs_weights": "the weights from it", "needs_gpu": "a CUDA device"}
        needs = [text for name, text in known.items() if row[name]]
        trained = {name: value for name, value in row["options"].items() if name.replace("_", "-") in SET_IN_TRAINING}
        # What a video may be given otherwise than its weights were trained with.
        own = {name: "as trained" if row["needs_weights"] else value for name, value in row["options"].items()}
        shown = {name: value for name, value in own.items() if name not in trained and value is not None}
        options = ", ".join(f"{name} {value}" for name, value in shown.items())
        in_training = ", ".join(f"{name} {value}" for name, value in trained.items())
        is_method = row["kind"] == "method"
        said = [row["summary"], f"needs {' and '.join(needs) or 'no training'}" if is_method else f"a {row['kind']}"]
        said += [f"options: {options}"] if options else []
        said += [f"set in training (slagen finetune): {in_training}"] if in_training else []
        said += [f"{flag}: {help}" for flag, help in row["flags"].items()]
        if len(row["backends"]) > 1:
            said.append(f"backends: {', '.join(row['backends'])}")
        table.add_row(row["name"], Cell("\n".join(map(line, said))))
    write_table(table)


def show_info(info: Info | Made | LatentsInfo, as_json: bool) -> None:
    """Print what a weight file, latents or a video are: a table on stdout, or JSON alone."""
    content = info.to_dict()
    if as_json:
        write_json(content)
        return
    table = Table()
    _add_rows(table, content, "")
    write_table(table)


def _add_rows(table: Table, content: dict[str, Any], prefix: str) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _add_rows(table, value, f"{prefix}{name}.")
        elif name == "loras":
            said = ", ".join(f"{lora['file']}:{lora['scale']:g}" for lora in value)
            table.add_row(Cell(line(prefix + name), "dim"), line(said))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            table.add_row(Cell(line(prefix + name), "dim"), f"{counted(len(value), 'item')} (--json shows them)")
        elif name == "proj_l_norms":
            norms = ", ".join(f"{norm:.3g}" for norm in value) or "none"
            table.add_row(Cell(line(f"{prefix}proj_l norms by layer"), "dim"), norms)
        elif name in ("trained_sizes", "vocabulary"):
            table.add_row(Cell(line(prefix + name), "dim"), line(", ".join(value)))
        elif prefix.endswith("parameter_norms."):
            table.add_row(Cell(line(f"{name} norms by layer"), "dim"), ", ".join(f"{norm:.3g}" for norm in value))
        else:
            plain = isinstance(value, bool) or not isinstance(value, int) or name == "seed"  # a seed is typed again
            text = str(value) if plain else f"{value:,}"
            table.add_row(Cell(line(prefix + name), "dim"), text)
