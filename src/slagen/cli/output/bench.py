"""What `bench` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.cli.console import write, write_json, write_sentence, write_table, write_text
from slagen.cli.table import Table

if TYPE_CHECKING:
    from slagen.benchmark.tables import BenchResult


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
        for text in below:
            write_sentence(text)
    if result.short_tables:
        write_text("")
        write_sentence("Times are medians. The files and --json also have quartiles and repeats.")
    for verdict in result.verdicts:
        write_sentence(verdict)
    for path in result.files:
        write(str(path))
