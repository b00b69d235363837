"""The page of one video's report, or of several beside each other: one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slagen.generation.cache_use import describe_use
from slagen.generation.measured_dense import describe_dense
from slagen.generation.stage_clock import MEASURE
from slagen.generation.video_report import ReportedStep, StagePeaks, VideoReport
from slagen.html import HEAD, data_uri, render
from slagen.io.paths import FRAMES, GIF, kind_of

GENERATOR = "slagen report"  # what the page says of who wrote it
EMBEDDED = 10 * 2**20  # bytes of a video at most that the page holds; a larger one is linked
STAGES = {"start": "start-up", "prepare": "preparing", "load": "loading", "text": "text encoder",
          "image": "image", "denoise": "denoising", MEASURE: "measuring dense attention", "preview": "preview",
          "compile": "compiling", "decode": "decoding", "wait": "waiting", "write": "writing"}  # fmt: skip

PAGE = (
    HEAD
    + """\
  :root { --attention: #1f6feb; --unconditional: #79b8ff; --rest: #a8b0b9; }
  @media (prefers-color-scheme: dark) { :root { --attention: #58a6ff; --unconditional: #1f5fb8; --rest: #59626c; } }
  h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
  h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
  .reports { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 2rem; }
  .reports > article { min-width: 0; }
  figure { margin: .5rem 0; } figcaption { padding: .4rem .7rem; overflow-wrap: anywhere; }
  video, figure img { max-height: 70vh; background: #0003; object-fit: contain; display: block; width: 100%; }
  .bar { display: flex; height: 1.4rem; border-radius: .3rem; overflow: hidden; }
  .bar span { min-width: 1px; }
  .scroll { overflow-x: auto; }
  .scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--attention); outline-offset: 2px; }
  svg { display: block; width: 100%; height: auto; }
  svg text { fill: currentColor; font-size: 11px; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  caption { text-align: left; padding: .3rem 0; }
  th, td { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid #8884; vertical-align: top; }
  th:first-child, td:first-child { text-align: left; }
  .settings td { text-align: left; overflow-wrap: anywhere; }
  .key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .4rem 0; }
  .key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; }
  code { overflow-wrap: anywhere; }
  summary { cursor: pointer; padding: .2rem 0; }
  @media print { details { display: block; } .reports { grid-template-columns: 1fr; } video { max-height: 20rem; } }
</style>
<main>
<h1>{{ title }}</h1>
{% if reports|length > 1 %}
<h2>Beside each other</h2>
<div class="scroll" tabindex="0" role="region" aria-label="times of all reports">
<table>
  <caption>Seconds, and in brackets how many times as fast as the first</caption>
  <thead><tr><th scope="col">stage</th>{% for r in reports %}<th scope="col">{{ r.name }}</th>{% endfor %}</tr></thead>
  <tbody>
  {% for row in compared %}
  <tr><th scope="row">{{ row.name }}</th>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
  {% endfor %}
  </tbody>
</table>
</div>
{% endif %}
{% set h = "h3" if reports|length > 1 else "h2" %}
<div class="reports">
{% for r in reports %}
<article>
  {% if reports|length > 1 %}<h2>{{ r.name }}</h2>{% endif %}
  {% if r.measured %}<p><strong>{{ r.measured }}.</strong></p>{% endif %}

  {% if r.gif %}
  <figure>
    <img src="{{ r.video }}" alt="{{ r.prompt }}">
    <figcaption>{{ r.prompt }}</figcaption>
  </figure>
  {% elif r.video %}
  <figure>
    <video src="{{ r.video }}" controls loop muted playsinline aria-label="{{ r.prompt }}"></video>
    <figcaption>{{ r.prompt }}</figcaption>
  </figure>
  {% elif r.frames %}<p>{{ r.prompt }} (<a href="./{{ r.frames|urlencode }}/">the frames</a>)</p>
  {% elif r.link %}<p>The video is too large for this page: <a href="./{{ r.link|urlencode }}">{{ r.link }}</a></p>
  {% else %}<p>{{ r.prompt }} (the video is not beside its report)</p>{% endif %}
  <p>{{ r.summary }}</p>
  <{{ h }}>Where the time went</{{ h }}>
  <div class="bar" role="img" aria-label="{{ r.stages_text }}">
    {% for stage in r.stages %}
    <span style="flex: {{ stage.seconds }} 0 0; background: {{ stage.colour }}"></span>{% endfor %}

  </div>
  <ul class="key">
    {% for stage in r.stages %}
    <li><i style="background: {{ stage.colour }}"></i>{{ stage.name }} {{ "%.2f"|format(stage.seconds) }} s\
{{ stage.memory }}</li>
    {% endfor %}
  </ul>
  {% if r.memory %}<p>{{ r.memory }}</p>{% endif %}

  {% if r.steps %}
  <{{ h }}>Each step</{{ h }}>
  <svg viewBox="0 0 {{ r.chart.width }} 150" role="img" aria-label="{{ r.steps_text }}">
    <text x="0" y="10">{{ "%.0f"|format(r.chart.top) }} ms</text>
    {% for bar in r.chart.bars %}
    <g><title>{{ bar.title }}</title>
    {% for part in bar.parts %}<rect x="{{ bar.x }}" y="{{ part.y }}" width="{{ r.chart.bar }}" \
height="{{ part.height }}" fill="{{ part.colour }}"></rect>{% endfor %}</g>
    {% endfor %}
    {% for label in r.chart.labels %}
    <text x="{{ label.x }}" y="147" text-anchor="middle">{{ label.text }}</text>
    {% endfor %}
  </svg>
  <ul class="key">
    {% for kind in r.chart.kinds %}
    <li><i style="background: {{ kind.colour }}"></i>{{ kind.label }}</li>
    {% endfor %}
  </ul>
  {% if r.heat %}
  <{{ h }}>Attention by layer and step</{{ h }}>
  <svg viewBox="0 0 {{ r.heat.width }} {{ r.heat.height }}" role="img" aria-label="{{ r.heat.text }}">
    {% for cell in r.heat.cells %}<rect x="{{ cell.x }}" y="{{ cell.y }}" width="{{ r.heat.cell }}" \
height="{{ r.heat.row }}" fill="var(--attention)" fill-opacity="{{ cell.share }}"><title>{{ cell.title }}</title>\
</rect>{% endfor %}
    {% for label in r.heat.labels %}<text x="0" y="{{ label.y }}">{{ label.text }}</text>{% endfor %}

  </svg>
  <p>{{ r.heat.text }}</p>
  {% endif %}
  <details><summary>Steps as a table</summary>
  <div class="scroll" tabindex="0" role="region" aria-label="steps of {{ r.name }}">
  <table>
    <thead><tr><th scope="col">step</th><th scope="col">timestep</th><th scope="col">ms</th>
      <th scope="col">attention, ms</th>{% for name in r.chart.parts %}<th scope="col">{{ name }}, ms</th>{% endfor %}
      <th scope="col">share</th></tr></thead>
    <tbody>
    {% for step in r.steps %}
    <tr><td>{{ step.step + 1 }}</td><td>{{ "%.0f"|format(step.timestep) }}</td>
      <td>{{ "%.1f"|format(step.latency_ms) }}</td>
      <td>{% if step.attention_ms is not none %}{{ "%.1f"|format(step.attention_ms) }}{% endif %}</td>
      {% for name in r.chart.parts.values() %}<td>{{ "%.1f"|format((step.parts_ms or {}).get(name, 0)) }}</td>\
{% endfor %}

      <td>{% if step.attention_share is not none %}{{ "%.0f"|format(100 * step.attention_share) }} %{% endif %}</td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
  </div></details>
  {% endif %}
  {% if r.computed %}
  <{{ h }}>Computed, not measured</{{ h }}>
  <p>{{ r.computed }}</p>
  {% endif %}
  <{{ h }}>How it was made</{{ h }}>
  <p>To make it again: <code>slagen replay {{ r.name }}</code></p>
  <details><summary>Settings, versions and hashes</summary>
  <table class="settings">
    <tbody>
    {% for name, value in r.facts %}
    <tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
    {% endfor %}
    </tbody>
  </table></details>
</article>
{% endfor %}
</div>
</main>
</html>
"""
)
COLOURS = (
    "#8b949e",
    "#6e7781",
    "#bf8700",
    "#8250df",
    "#2da44e",
    "var(--attention)",
    "#fb8f44",
    "#bc4c9c",
    "#9a6700",
    "#1a7f37",
    "#d4a72c",
    "#cf222e",
)  # of STAGES

PARTS = {"block_map": "block map", "state": "states", "projection": "projection", "sparse": "sparse attention",
         "linear": "linear attention", "fused": "fused attention"}  # fmt: skip
# Of a step, what the bars are made of, from below: what it is called, and its colour.
KINDS = {
    "attention": ("attention, with the prompt", "var(--attention)"),
    "unconditional": ("attention, without it", "var(--unconditional)"),
    **{name: (label, colour) for (name, label), colour in zip(PARTS.items(), (
        "#bf8700", "#8250df", "#cf222e", "var(--attention)", "#1a7f37", "var(--attention)"), strict=True)},
    "inside": ("the rest of attention", "var(--unconditional)"),
    "rest": ("everything else", "var(--rest)"),
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A report on the page: its file's name, what it says, and the video beside it (None where it is not there)."""

    name: str
    report: VideoReport
    video: bytes | None


def report_page(shown: Sequence[Shown]) -> str:
    """The HTML of one report or several, the first of which the others are compared to."""
    title = shown[0].report.settings["prompt"] if len(shown) == 1 else f"{len(shown)} reports"
    compared = _compared(shown) if len(shown) > 1 else []
    return render(PAGE, title=title, generator=GENERATOR, reports=[_content(each) for each in shown], compared=compared)


def _content(shown: Shown) -> dict[str, Any]:
    report, video = shown.report, shown.video
    settings, cost, attention = report.settings, report.cost, report.attention
    steps = [step for step in report.steps if step.latency_ms is not None]
    stages = [
        {"name": label, "seconds": report.stages_s[name], "colour": colour, "memory": _memory_of(report, name)}
        for (name, label), colour in zip(STAGES.items(), COLOURS, strict=True)
        if report.stages_s.get(name)
    ]
    kind = kind_of(report.video.file or "")
    fits = video is not None and len(video) <= EMBEDDED
    share = cost.measured_attention_share
    return {
        "name": shown.name, "prompt": settings["prompt"], "video": data_uri(video, kind) if video and fits else None,
        "gif": kind == GIF and video is not None and fits,
        "frames": report.video.file if kind == FRAMES else None,
        "link": report.video.file if video is not None and not fits else None,
        "summary": _summary(report), "measured": _measured(report),
        "memory": _about_memory(report.stage_memory),
        "stages": stages,
        "stages_text": ", ".join(f"{stage['name']} {stage['seconds']:.2f} seconds" for stage in stages),
        "steps": steps, "chart": _chart(steps),
        "steps_text": f"{len(steps)} steps" + (f"; attention took {share:.0%} of their time" if share else ""),
        "heat": _heat(steps),
        "computed": None if attention.mode == "dense" else (
            f"With dense attention, the forward passes would have taken {cost.flops_speedup:.2f} times as many FLOPs. "
            f"Even if attention cost nothing, this factor would be {cost.amdahl_ceiling:.2f} (Amdahl's law)."
        ),
        "facts": _facts(report),
    }  # fmt: skip


def _memory_of(report: VideoReport, stage: str) -> str:
    """The most memory of a stage, to stand behind its time; empty where nobody looked."""
    peaks = report.stage_memory.peak_gib if report.stage_memory is not None else {}
    if stage not in peaks:
        return ""
    return f" ({'memory not known' if (peak := peaks[stage]) is None else f'{peak:.2f} GiB'})"


def _about_memory(memory: StagePeaks | None) -> str | None:
    """What the numbers in brackets are."""
    if memory is None:
        return None
    text = f"In brackets the most memory of the {memory.of} in each stage."
    return text if memory.unknown is None else f"{text} Some of it is not known: {memory.unknown}."


def _measured(report: VideoReport) -> str | None:
    if report.measured_dense is None:
        return None
    text = describe_dense(report.measured_dense)
    return text[0].upper() + text[1:]


def _summary(report: VideoReport) -> str:
    video, settings, cost = report.video, report.settings, report.cost
    parts = [
        f"{video.frames} frames of {video.width}x{video.height} at {video.fps} fps, seed {settings['seed']}",
        f"{report.attention.mode} attention over {report.attention.tokens:,} tokens",
        f"{report.stages_s['total']:.1f} s in all",
    ]
    if report.cache is not None:
        parts.append(describe_use(report.cache))
    if cost.measured_attention_share is not None:
        parts.append(f"attention took {cost.measured_attention_share:.0%} of the steps' time")
    if report.attention.density is not None:
        parts.append(f"{report.attention.density:.1%} of all query-key pairs attended exactly")
    elif report.attention.blocks is not None:
        parts.append(f"{report.attention.blocks.critical_share:.1%} of the key blocks attended exactly")
    return f"{'; '.join(parts)}. Measured on {report.device.name}."


def _split(step: ReportedStep) -> list[tuple[str, float]]:
    """The milliseconds of a step by kind: the parts of attention where they were timed, otherwise its passes."""
    if step.parts_ms:
        inside = [(name, step.parts_ms.get(name, 0.0)) for name in PARTS]
        inside.append(("inside", max(0.0, (step.attention_ms or 0.0) - sum(step.parts_ms.values()))))
    else:
        inside = [("attention", step.attention_conditional_ms or 0.0)]
        inside.append(("unconditional", step.attention_unconditional_ms or 0.0))
    return [*inside, ("rest", max(0.0, (step.latency_ms or 0.0) - sum(value for _, value in inside)))]


def _chart(steps: Sequence[ReportedStep]) -> dict[str, Any]:
    """Stacked bars in a drawing 150 high, of which 15 at the top and at the bottom are for text."""
    width = max(360, 14 * len(steps))
    pitch = width / max(1, len(steps))
    top = max((step.latency_ms or 0.0 for step in steps), default=1.0)
    seen: set[str] = set()
    bars = []
    for i, step in enumerate(steps):
        y, parts = 135.0, []
        for kind, value in _split(step):
            height = 120 * value / top
            y -= height
            if value:
                seen.add(kind)
                parts.append({"colour": KINDS[kind][1], "y": f"{y:.2f}", "height": f"{height:.2f}"})
        said = f"step {step.step + 1}: {step.latency_ms:.1f} ms, attention {step.attention_ms or 0:.1f} ms"
        for name, value in (step.parts_ms or {}).items():
            said += f", {PARTS.get(name, name)} {value:.1f} ms"
        bars.append({"x": f"{i * pitch:.2f}", "parts": parts, "title": said})
    every = max(1, len(steps) // 10)
    labels = [{"x": f"{(i + 0.4) * pitch:.2f}", "text": str(i + 1)} for i in range(0, len(steps), every)]
    kinds = [{"label": label, "colour": colour} for kind, (label, colour) in KINDS.items() if kind in seen]
    return {
        "width": f"{width:g}", "bar": f"{0.8 * pitch:.2f}", "bars": bars, "top": top, "labels": labels, "kinds": kinds,
        "parts": {label: name for name, label in PARTS.items() if name in seen},
    }  # fmt: skip


def _heat(steps: Sequence[Any]) -> dict[str, Any] | None:
    """Attention time, a row of cells for each layer; None where it was not taken."""
    rows = [step.layers_ms for step in steps]
    if not rows or not all(rows):
        return None
    layers, most = len(rows[0]), max(max(row) for row in rows)
    least = min(min(row) for row in rows)
    left, row_height, width = 55, max(6, min(18, 240 // layers)), max(360, 14 * len(rows))
    pitch = (width - left) / len(rows)
    cells = [
        {"x": f"{left + i * pitch:.2f}", "y": layer * row_height, "share": f"{value / most:.3f}",
         "title": f"step {i + 1}, layer {layer}: {value:.2f} ms"}
        for i, row in enumerate(rows) for layer, value in enumerate(row)
    ]  # fmt: skip
    every = max(1, layers * 12 // 240)
    labels = [{"y": (layer + 1) * row_height - 2, "text": f"layer {layer}"} for layer in range(0, layers, every)]
    return {
        "width": f"{width:g}", "height": layers * row_height, "cell": f"{pitch:.2f}", "row": row_height, "cells": cells,
        "labels": labels,
        "text": f"From {least:.2f} ms (pale) to {most:.2f} ms (full colour); steps from left to right.",
    }  # fmt: skip


def _facts(report: VideoReport) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return [
        *((name, text(value)) for name, value in report.settings.items() if value is not None),
        ("machine", text({k: v for k, v in report.device.to_dict().items() if v is not None})),
        ("weights", report.weights.used),
        *((f"hash of {name}", value) for name, value in report.hashes.items()),
        *_accounted(report),
        ("peak memory", f"{report.peak_memory_gib:.2f} GiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]


def _accounted(report: VideoReport) -> list[tuple[str, str]]:
    """How much of the time that a clock of its own counted the stages account for; nothing where none counted."""
    if not report.wall_s:
        return []
    total = report.stages_s["total"] + report.stages_s.get(MEASURE, 0.0)
    return [("time", f"{report.wall_s:.2f} s, of which the stages are {total:.2f} s ({total / report.wall_s:.1%})")]


def _compared(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Rows of seconds by stage, each with its ratio to the first report's."""
    rows = []
    first = shown[0].report
    for name in dict.fromkeys(name for each in shown for name in each.report.stages_s):
        base, cells = first.stages_s.get(name), []
        for index, each in enumerate(shown):
            seconds = each.report.stages_s.get(name)
            ratio = f" ({base / seconds:.2f}x)" if index and base and seconds else ""
            cells.append("" if seconds is None else f"{seconds:.2f}{ratio}")
        rows.append({"name": STAGES.get(name, name), "cells": cells})
    attention = [_attention_s(each.report) for each in shown]
    cells = []
    for index, seconds in enumerate(attention):
        ratio = f" ({attention[0] / seconds:.2f}x)" if index and attention[0] and seconds else ""
        cells.append("" if seconds is None else f"{seconds:.2f}{ratio}")
    return [*rows, {"name": "attention", "cells": cells}]


def _attention_s(report: VideoReport) -> float | None:
    times = [step.attention_ms for step in report.steps if step.attention_ms is not None]
    return sum(times) / 1e3 if times else None
