"""--trace: the stages, steps, layers and parts of a run as a file for Chrome's tracing or Perfetto. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slagen.errors import SlagenError
from slagen.io.files import write_text
from slagen.io.text import to_json
from slagen.packages import versions
from slagen.timing import COMMUNICATION, PlacedSpan, StepTimes

if TYPE_CHECKING:
    from slagen.generation.sample import Sample
    from slagen.generation.stage_clock import Lap

HOST, DEVICE = 1, 2  # rows of the trace: stages on the host's clock, steps on the device's

# Of --measure-dense, by the keys of the recorder.
MEASURED = {
    "pass": "forward pass", ("dense", "pass"): "dense pass", ("dense", "extra"): "dense pass, not counted",
    ("dense", "attention"): "dense attention",
}  # fmt: skip


def write_trace(sample: Sample, path: Path) -> None:
    """Write the trace of a video whose stages have ended. Raises SlagenError where it cannot be written."""
    config, recorder = sample.plan.config, sample.denoised.recorder
    content = {
        "traceEvents": trace_events(
            sample.clock.laps, recorder.steps, recorder.spans, (recorder.origin_s - sample.clock.began) * 1e6,
            str(sample.plan.weights.device),
        ),
        "displayTimeUnit": "ms",
        "otherData": {"prompt": config.prompt, "seed": str(config.seed), "slagen": versions()["slagen"]},
    }  # fmt: skip
    try:
        write_text(path, to_json(content, allow_nan=False) + "\n", replace=config.overwrite)
    except OSError as error:
        raise SlagenError(
            f"the video was written, but its trace could not be written to {path} ({error.strerror or error}). Give "
            "another file with --trace."
        ) from error


def trace_events(
    laps: list[Lap], steps: list[StepTimes], spans: list[PlacedSpan], denoising_us: float, device: str
) -> list[dict[str, Any]]:
    """Complete events ("X") with ts and dur in microseconds since the process began, and the names of their rows.

    Args:
        laps: the stages. spans: of `steps`, in milliseconds since the denoising began, which was at `denoising_us`.
    """
    names = {HOST: "stages", DEVICE: f"steps, layers and parts ({device})"}
    about = [_name("process_name", HOST, "slagen"), *(_name("thread_name", row, text) for row, text in names.items())]
    stages = [_event(lap.stage, "stage", HOST, lap.start_s * 1e6, lap.seconds * 1e6, {}) for lap in laps]
    events = [*stages, *(_of_span(span, steps, denoising_us) for span in spans)]
    return [*about, *sorted(events, key=lambda event: (event["tid"], event["ts"], -event["dur"]))]


def _of_span(span: PlacedSpan, steps: list[StepTimes], denoising_us: float) -> dict[str, Any]:
    start, length, key = denoising_us + span.start_ms * 1e3, span.ms * 1e3, span.key
    about: dict[str, Any] = {"step": span.step + 1}
    if key == "step":
        about["timestep"] = steps[span.step].timestep
        return _event(f"step {span.step + 1}", "step", DEVICE, start, length, about)
    if key == COMMUNICATION:
        return _event("exchange with other processes", COMMUNICATION, DEVICE, start, length, about)
    if key in MEASURED:
        return _event(MEASURED[key], "measure", DEVICE, start, length, about)
    number, layer, *part = key
    about |= {"layer": layer, "pass": "unconditional" if number else "conditional"}
    name, kind = (part[0], "part") if part else (f"attention, layer {layer}", "layer")
    return _event(name, kind, DEVICE, start, length, about)


def _event(name: str, kind: str, row: int, start: float, length: float, about: dict[str, Any]) -> dict[str, Any]:
    """A complete event; begin and end are rounded, so that what lies within another stays within it."""
    ts = round(start, 3)
    dur = round(round(start + length, 3) - ts, 3)
    return {"name": name, "cat": kind, "ph": "X", "ts": ts, "dur": dur, "pid": 1, "tid": row, "args": about}


def _name(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
