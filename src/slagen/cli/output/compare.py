"""What `compare` prints: a row for each method, or what differs between two reports."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from slagen.cli.console import log, log_table, write, write_json, write_table
from slagen.cli.table import Table
from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.comparison.reports import ReportsCompared
    from slagen.comparison.result import Comparison, Row

COLUMNS = ("velocity error", "PSNR, dB", "SSIM", "attention, ms", "share", "denoising, s", "speed-up")


def show_comparison(result: Comparison, as_json: bool) -> None:
    """Print a comparison: the table on stderr and the paths on stdout, or JSON alone on stdout."""
    if as_json:
        write_json(result.to_dict(), allow_nan=False)
        return
    table = Table("method", *COLUMNS, right=True)
    for row in result.rows:
        table.add_row(row.label, *_cells(result, row))
    log_table(table)
    if result.controls:
        log("")
        controls = Table("control", *COLUMNS, right=True)
        for row in result.controls:
            controls.add_row(row.label, *_cells(result, row))
        log_table(controls)
    runs = len(result.reference.denoise_s)
    log(
        "Errors, PSNR and SSIM are measured against dense attention with the same noise. Times are medians of "
        f"{counted(runs, 'run')}, and the speed-up is that of the denoising. Quartiles, errors by layer and "
        f"{'intervals' if len(result.prompts) > 1 else 'densities'} are in the JSON."
    )
    for path in (*result.videos, result.path):
        write(str(path))


def _cells(result: Comparison, row: Row) -> list[str]:
    attention, denoise = statistics.median(row.attention_ms), statistics.median(row.denoise_s)
    error, psnr, ssim = row.mean("velocity_error"), row.mean("psnr_db"), row.mean("ssim")
    return [
        "" if error is None else f"{error:.3f}", ("same" if row.mean("latent_error") == 0 else "") if psnr is None
        else f"{psnr:.1f}", "" if ssim is None else f"{ssim:.3f}", f"{attention:.0f}",
        f"{attention / (1e3 * denoise):.0%}", f"{denoise:.2f}", f"{result.speedup(row):.2f}x",
    ]  # fmt: skip


def show_reports(result: ReportsCompared, as_json: bool) -> None:
    """Print what differs between two reports: tables on stdout, or JSON alone."""
    if as_json:
        write_json(result.to_dict(), allow_nan=False)
        return
    table = Table("", result.names[0], result.names[1], "first / second")
    for name, pair in result.settings_changed.items():
        table.add_row(name, *("" if value is None else str(value) for value in pair), "")
    for name, (first, second) in result.times_s.items():
        ratio = f"{first / second:.2f}x" if first and second else ""
        table.add_row(f"{name}, s", *("" if value is None else f"{value:.2f}" for value in (first, second)), ratio)
    write_table(table)
    same = "the same" if result.same_latents else "different"
    write(f"latents: {same}; {'the same machine' if result.same_device else 'different machines'}")
