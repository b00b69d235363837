"""The HTML page of a training: curves from its log, and clips of the dense model beside the student's."""

from dataclasses import dataclass
from pathlib import Path

from slagen.html import HEAD, data_uri, render
from slagen.io.files import write_text
from slagen.plot import Chart, Line, draw_chart
from slagen.training.log import CLIPS, StepRecord, ValidationRecord, read_log
from slagen.video import make_thumbnail

PAGE = "index.html"


def write_page(
    folder: Path, title: str, facts: dict[str, str], layers: dict[str, list[float]], captions: list[str]
) -> Path:
    """The page of a run, from its log and clips.

    Args:
        facts: for the table at its top. layers: error of self-attention by layer, "before" and "after".
        captions: of the clips `step-NNNNNN-I.mp4`, by I.
    """
    log = read_log(folder)
    steps = [record for record in log if isinstance(record, StepRecord)]
    checks = [record for record in log if isinstance(record, ValidationRecord)]
    layers_seen = min((len(record.proj_norms) for record in steps), default=0)
    x = [record.step for record in steps]
    errors = [(record.step, record.error) for record in steps if record.error is not None]
    charts = [
        Chart("loss", "step", [Line("loss", x, [record.loss for record in steps])], log=True),
        Chart("relative L2 error to the dense teacher", "step", [
            Line("training clips", [step for step, _ in errors], [error for _, error in errors]),
            Line("held-out clips, averaged weights", [c.step for c in checks], [c.error for c in checks], True),
        ], log=True),
        Chart("gradient norm", "step", [Line("before clipping", x, [record.grad_norm for record in steps])], log=True),
        Chart("norm of the attention's learned weights by layer", "step", [
            Line(f"layer {i}", x, [record.proj_norms[i] for record in steps])
            for i in range(layers_seen)
        ]),
        Chart("relative L2 error of self-attention by layer", "layer", [
            Line(name, list(range(len(found))), found, True) for name, found in layers.items()
        ]),
    ]  # fmt: skip
    pairs = []
    for validation in checks:
        for name in validation.clips:
            path, number = folder / CLIPS / name, int(name[:-4].rsplit("-", 1)[1])
            if path.is_file() and number < len(captions):
                caption = captions[number]
                pairs.append(Pair(validation.step, caption, make_thumbnail(path, 480), f"{CLIPS}/{name}"))
    write_text(folder / PAGE, training_page(title, facts, [draw_chart(chart) for chart in charts], pairs))
    return folder / PAGE


TRAINING = (
    HEAD
    + """\
  h1 { font-size: 1.2rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
  dt { opacity: .7; } dd { margin: 0; }
  section { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
  section svg { width: 100%; height: auto; background: white; border-radius: .5rem; }
  figcaption { padding: .5rem .7rem; overflow-wrap: anywhere; }
</style>
<main>
<h1>{{ title }}</h1>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<h2>Curves</h2>
<section>{% for chart in charts %}<div>{{ chart|safe }}</div>{% endfor %}</section>
<h2>Dense model (left) and fine-tuned model, same prompts and seeds</h2>
<section>
{% for pair in pairs %}
  <figure>
    <video src="{{ pair.source }}" autoplay loop muted playsinline></video>
    <figcaption>step {{ pair.step }}: {{ pair.caption }} (<a href="./{{ pair.file|urlencode }}">file</a>)</figcaption>
  </figure>
{% endfor %}
</section>
</main>
</html>
"""
)


@dataclass(frozen=True)
class Pair:
    """A side-by-side clip of a training: after which step, of what prompt, as a small MP4, and its file."""

    step: int
    caption: str
    video: bytes
    file: str

    @property
    def source(self) -> str:
        """The small MP4 as a data URI."""
        return data_uri(self.video)


def training_page(title: str, facts: dict[str, str], charts: list[str], pairs: list[Pair]) -> str:
    """The HTML of a page on a training: facts, curves (SVG elements), and clips."""
    return render(TRAINING, title=title, facts=facts, charts=charts, pairs=pairs)
