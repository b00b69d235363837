"""What `plan` prints: an estimate of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slagen.cli.console import note, write_json, write_table
from slagen.cli.table import Cell, Table
from slagen.io.text import counted

if TYPE_CHECKING:
    from slagen.generation.run_estimate import RunEstimate, RunMemory


def show_plan(estimate: RunEstimate, as_json: bool) -> None:
    """Print the estimate of a run: a table on stdout, or JSON alone."""
    if as_json:
        write_json(estimate.to_dict())
        return
    settings, memory = estimate.settings, estimate.memory_gib
    tera = {name: flops / 1e12 for name, flops in vars(estimate.flops).items()}
    tail = f", the last with {counted(estimate.tail_tokens, 'token')}" if estimate.tail_tokens else ""
    blocks = (
        ""
        if estimate.query_blocks is None or estimate.key_blocks is None
        else (
            f": {counted(estimate.query_blocks, 'query block')} of {counted(settings['block_m'], 'token')}, "
            f"{counted(estimate.key_blocks, 'key block')} of {counted(settings['block_n'], 'token')}{tail}"
        )
    )
    of = "SLA" if estimate.flops_of == "sla" else estimate.flops_of
    rows = [
        ("model", estimate.model),
        ("video", f"{settings['width']}x{settings['height']}, {counted(settings['num_frames'], 'frame')}, "
                  f"{settings['fps']} fps"),
        ("sampling", f"{counted(settings['steps'], 'step')} of {settings['sampler']}, "
                     f"guidance {settings['guidance_scale']:g}: "
                     f"{counted(estimate.forward_passes, 'forward pass')}"),
        ("tokens", f"{estimate.tokens}{blocks}"),
        ("attention", _planned_attention(estimate)),
        ("TFLOP per pass", f"dense {_rounded(tera['dense_forward'])}, of which attention "
                            f"{_rounded(tera['dense_attention'])}; "
                            f"{of} {_rounded(tera['sla_forward'])}, of which attention "
                            f"{_rounded(tera['sla_attention'])}"),
        ("FLOP reduction", f"{estimate.flops_speedup:.2f}x; the limit is {estimate.amdahl_ceiling:.2f}x "
                           f"(Amdahl's law)"),
        *_memory_rows(estimate.device, memory),
        *[("download", f"{row.repository}, about {_rounded(row.gib)} GiB unless cached")
          for row in estimate.downloads],
        *[("output", name) for name in estimate.outputs],
    ]  # fmt: skip
    table = Table()
    for name, text in rows:
        table.add_row(Cell(name, "dim"), text)
    write_table(table)
    for text in estimate.notes:
        note(text)


def _rounded(value: float) -> str:
    """An estimate: to a tenth, or to two digits below 1."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _kept(settings: dict[str, Any]) -> str:
    """The option that sets how many blocks are kept."""
    if settings["sla_topk"] is None:
        return f"sparsity {settings['sparsity']:g}"
    return f"sla-topk {settings['sla_topk']:g}"


def _planned_attention(estimate: RunEstimate) -> str:
    """What a plan says is kept of all query-key pairs."""
    settings = estimate.settings
    if settings["attention"] == "dense":
        return "dense: every key block"
    if (by_step := estimate.step_densities) is not None:
        return (
            f"{settings['attention']}: {min(by_step):.2%} to {max(by_step):.2%} of all query-key pairs attended "
            f"exactly in each step, {estimate.kept_fraction:.2%} on average"
        )
    if not estimate.topk_blocks or estimate.key_blocks is None:
        return f"{settings['attention']}: {estimate.kept_fraction:.2%} of all query-key pairs attended exactly"
    return (
        f"{_kept(settings)} -> top-k {estimate.topk_blocks:g} of {counted(estimate.key_blocks, 'key block')} "
        f"(kept {estimate.kept_fraction:.2%})"
    )


def _memory_rows(device: str | None, memory: RunMemory) -> list[tuple[str, str]]:
    """What a plan says of memory: of the machine's own where it runs on a CPU, of a card's, or of both."""
    cpu = memory.cpu
    on_cpu = f"about {_rounded(cpu.peak)} GiB of RAM on a CPU ({_rounded(cpu.left)} GiB is available)"
    if device == "cpu":
        stages = (
            f"weights {_rounded(cpu.weights)}, plus {_rounded(cpu.denoise)} for denoising or "
            f"{_rounded(cpu.decode)} for decoding (estimates)"
        )
        return [("memory", on_cpu), ("by stage, GiB", stages)]
    parts = memory.stages.items()
    stages = ", ".join(f"{name} {_rounded(stage.weights)} + {_rounded(stage.activations)}" for name, stage in parts)
    on_card = (
        f"about {_rounded(memory.gpu_peak_all_resident)} GiB on {'the' if device else 'a'} GPU with all models "
        f"resident, {_rounded(memory.gpu_peak_offloaded)} GiB with one at a time; {_rounded(memory.host)} GiB of host "
        "memory"
    )
    rows = [("memory", on_card), ("by stage, GiB", f"weights + activations: {stages} (estimates)")]
    return rows if device is not None else [("memory", on_cpu), ("", on_card), *rows[1:]]
