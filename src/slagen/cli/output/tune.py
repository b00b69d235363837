"""What `tune` prints: the sparsity of each layer, its cost and error, and the curve on other prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.cli.console import log, log_table, write, write_json
from slagen.cli.table import Table
from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.tuning.result import Tuned


def show_tuned(result: Tuned, as_json: bool) -> None:
    """Print what was found on stderr and the file's path on stdout, or JSON alone on stdout."""
    if as_json:
        write_json(result.to_dict(), allow_nan=False)
        return
    layers = Table("layer", *(f"steps {steps}" for steps, _ in result.schedule.parts), right=True)
    for layer in range(result.schedule.num_layers):
        layers.add_row(str(layer), *(f"{own[layer]:g}" for _, own in result.schedule.parts))
    log_table(layers)
    if result.curve:
        log("")
        log_table(_curve(result))
        compared = [point.is_below for point in result.curve if point.is_below is not None]
        log(
            f"On prompts that were not used for tuning, the schedule's error is below that of one sparsity everywhere "
            f"at {sum(compared)} of {counted(len(compared), 'cost')} where they differ."
        )
    share = result.chosen.flops / result.dense_flops
    log(
        f"The velocity error is {result.chosen.error:.4g} (bound {result.max_error:.4g}) with {share:.1%} of dense "
        "attention's FLOPs (computed). Use the file with --sparsity-schedule."
    )
    write(str(result.path))


def _curve(result: Tuned) -> Table:
    """For each cost, the errors on the held-out prompts."""
    table = Table("FLOPs of dense attention", "one sparsity", "its error", "tuned FLOPs", "tuned error", right=True)
    for point in result.curve:
        own = ("", "") if point.uniform is None else (f"{point.uniform.sparsity:g}", f"{point.uniform.error:.4f}")
        tuned = point.tuned.flops / result.dense_flops
        table.add_row(f"{point.budget / result.dense_flops:.1%}", *own, f"{tuned:.1%}", f"{point.tuned.error:.4f}")
    return table
