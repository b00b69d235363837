"""What `doctor --kernels` prints: the cost of each kernel on each card, and an estimate of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.cli.console import json_text, write_sentence, write_table, write_text
from slagen.cli.table import Table
from slagen.io.text import line

if TYPE_CHECKING:
    from slagen.kernels.costs import KernelCost, KernelCosts, OperatorCall

MAIN_KERNELS = ("attend", "attend-128", "key-states", "dq", "dkv", "select")  # at heads of 128


def show_kernels(costs: KernelCosts, as_json: bool) -> None:
    """Print what the kernels cost on each card: tables on stdout that fit 80 columns, or JSON alone, a kernel a line.

    A table has the main kernels of one card, and those that break a limit; "per iteration" are
    the instructions of the main loop's body, "async copies" the groups of copies during the products.
    """
    if as_json:
        about = costs.to_dict()
        rows = ",\n".join(map(json_text, about.pop("kernels")))
        write_text(f'{json_text(about)[:-1]}, "kernels": [\n{rows}\n]}}')
        return
    shown = 0
    targets: dict[str, list[KernelCost]] = {}
    for row in costs.kernels:
        targets.setdefault(row.target, []).append(row)
    for target, compiled in targets.items():
        main = [row for row in compiled if row.kernel in MAIN_KERNELS and row.head_dim == 128]
        broken = [row for row in compiled if row.faults]
        others = [row for row in broken if row not in main]
        shown += len(main) + len(others)
        write_text("")
        write_sentence(f"{target}, {compiled[0].shared_limit // 1024} KiB of shared memory")
        for part in (main, *(others[i : i + 3] for i in range(0, len(others), 3))):
            if part:
                write_table(_kernel_table(part))
        for row in broken:
            write_sentence(f"{row.kernel}, D = {row.head_dim}: {'; '.join(row.faults)}")
    write_text("")
    write_sentence(
        f"{shown} of {len(costs.kernels)} kernels are shown: the main ones at head dimension 128, and those that "
        "break a limit. --json lists them all."
    )
    _show_operator(costs.operator)


def _kernel_table(rows: list[KernelCost]) -> Table:
    """A column for each kernel, a line for each thing that it costs."""
    table = Table("", *(line(row.kernel) for row in rows), right=True)
    values: dict[str, list[object]] = {
        "D": [row.head_dim for row in rows],
        "tile": [f"{row.config['tile_m']}x{row.config['tile_n']}" if "tile_m" in row.config else ""
                 for row in rows],
        "warps": [row.config["num_warps"] for row in rows],
        "stages": [row.config["num_stages"] for row in rows],
        "shared KiB": [f"{row.shared_bytes / 1024:.0f}" for row in rows],
        "registers": [row.registers for row in rows],
        "spilled bytes": [row.spill_bytes for row in rows],
        "tensor cores": [row.mma or "" for row in rows],
        "programs per SM": [row.programs_per_sm for row in rows],
        "instructions": [row.instructions for row in rows],
        "per iteration": [row.round_instructions or "" for row in rows],
        "per row": [row.row_instructions or "" for row in rows],
        "async copies": [row.copies_in_flight for row in rows],
    }  # fmt: skip
    for name, cells in values.items():
        if any(cell != "" for cell in cells):
            table.add_row(name, *cells)
    return table


def _show_operator(operator: OperatorCall) -> None:
    """One call of the operator: its launches, and the bounds of each kernel."""
    write_text("")
    write_sentence(
        f"one call at {operator.shape}, {operator.dtype}, sparsity {operator.sparsity:g}, linear domain "
        f"{operator.linear_domain}: {operator.launches} launches, {operator.estimate_ms['total']:.2f} ms "
        f"on one {operator.card} (estimated, not measured)"
    )
    table = Table("kernel", "launches", "tensor ms", "issue ms", "L2 ms", "DRAM ms", "estimate ms", right=True)
    for name, row in operator.bounds_ms.items():
        times = (row.tensor, row.issue, row.l2, row.dram, row.estimate)
        table.add_row(name, row.launches, *(f"{time:.3f}" for time in times))
    write_table(table)
