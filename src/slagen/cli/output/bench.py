"""What `bench` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from slagen.cli.console import write, write_json, write_sentence, write_table, write_text
from slagen.cli.live import bar_characters
from slagen.cli.table import Table
from slagen.plot import ratio_text

if TYPE_CHECKING:
    from slagen.benchmark.tables import BenchResult


BAR = 32  # columns of the longest bar


def show_bench(result: BenchResult, as_json: bool) -> None:
    """Print what `bench` measured: tables on stdout that fit 80 columns, or JSON alone."""
    if as_json:
        write_json(result.to_dict(), allow_nan=False)
        return
    about = result.machine
    write_sentence(f"{about.device.name}: matmul {about.matmul_tflops:.3g} TFLOP/s, copy {about.copy_gb_s:.3g} GB/s")
    for heading, columns, rows, below in result.short_tables:
        used = [index for index, name in enumerate(columns) if any(row[index] for row in rows)]
        table = Table(*(columns[index] for index in used))
        for row in rows:
            table.add_row(*(row[index] for index in used))
        write_text("")
        write_sentence(heading)
        write_table(table)
        for text in (*_bars(result.speedup_bars.get(heading, [])), *below):
            write_sentence(text)
    if result.short_tables:
        write_text("")
        write_sentence("Times are medians. The files and --json also have quartiles and repeats.")
        if result.rows:
            write_sentence("Dense-equivalent TFLOP/s count every query-key pair, whether it is attended or not.")
    for verdict in result.verdicts:
        write_sentence(verdict)
    for path in result.files:
        write(str(path))


def _bars(speedups: list[tuple[str, float]]) -> list[str]:
    """A bar for each speed-up, with the ratio on it."""
    width = max((len(name) for name, _ in speedups), default=0)
    top = max((ratio for _, ratio in speedups), default=1.0)
    full, _ = bar_characters(sys.stdout.encoding)
    return [
        f"{name:<{width}}  {full * max(1, round(BAR * ratio / top))} {ratio_text(ratio)}" for name, ratio in speedups
    ]
