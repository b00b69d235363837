"""The page of a training: a verdict, a row of clips for each prompt, curves, and the next commands."""

from __future__ import annotations

from dataclasses import dataclass

from slagen.html import HEAD, data_uri, render

TRAINING = (
    HEAD
    + """\
  :root { --line-0: #1f6feb; --line-1: #b35900; --line-2: #1a7f37; --line-3: #8250df; --line-4: #a40e26;
    --line-5: #0a7a80; }
  @media (prefers-color-scheme: dark) { :root { --line-0: #58a6ff; --line-1: #f0a050; --line-2: #56d364;
    --line-3: #bc8cff; --line-4: #ff7b72; --line-5: #39c5cf; } }
  h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
  h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
  .verdict { font-size: 1.1rem; font-weight: 600; }
  dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: 0; }
  dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
  .row { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .7rem; max-width: 900px; }
  video { background: #0003; }
  figcaption { padding: .4rem .6rem; }
  .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1rem; }
  .charts svg { width: 100%; height: auto; display: block; }
  button { font: inherit; padding: .2rem .8rem; border: 1px solid #8888; border-radius: 1rem; background: none;
    color: inherit; cursor: pointer; }
  button:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--line-0);
    outline-offset: 2px; }
  code { overflow-wrap: anywhere; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  caption { text-align: left; } th, td { text-align: right; padding: .15rem .7rem .15rem 0; }
  summary { cursor: pointer; padding: .2rem 0; }
  @media print { button { display: none; } .charts, .row { break-inside: avoid; } }
</style>
<main>
<h1>{{ title }}</h1>
<p class="verdict">{{ verdict }}</p>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% if rows %}
<h2>Clips, same prompts and seeds</h2>
<p><button type="button" id="play" aria-pressed="true">pause</button></p>
{% for row in rows %}
<h3>{{ row.caption }}</h3>
<div class="row">
  {% for clip in row.clips %}
  <figure>
    <video src="{{ clip.source }}" muted playsinline aria-label="{{ clip.label }}: {{ row.caption }}"></video>
    <figcaption>{% if clip.file %}<a href="./{{ clip.file|urlencode }}">{{ clip.label }}</a>{% else %}{{ clip.label }}\
{% endif %}{% if clip.psnr %}<br>{{ clip.psnr }}{% endif %}</figcaption>
  </figure>
  {% endfor %}
</div>
{% endfor %}
{% endif %}
<h2>What to do next</h2>
{% for about, command in commands %}
<p>{{ about }}: <code>{{ command }}</code>
  <button type="button" class="copy" aria-label="copy: {{ about }}">copy</button></p>
{% endfor %}
<h2>Curves</h2>
<div class="charts">
{% for chart in charts %}<div role="img" aria-label="{{ chart.label }}">{{ chart.svg|safe }}</div>
{% endfor %}
</div>
{% if layers %}
<details>
<summary>Error of self-attention by layer, in numbers</summary>
<table>
  <caption>Relative L2 error to the dense teacher</caption>
  <thead><tr><th scope="col">layer</th><th scope="col">before</th><th scope="col">after</th></tr></thead>
  <tbody>
  {% for before, after in layers %}
  <tr><th scope="row">{{ loop.index0 }}</th><td>{{ "%.4f"|format(before) }}</td><td>{{ "%.4f"|format(after) }}\
{% if after > before %} (worse){% endif %}</td></tr>
  {% endfor %}
  </tbody>
</table>
</details>
{% endif %}
<h2>The run</h2>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</main>
<script>
  const videos = [...document.querySelectorAll("video")], button = document.querySelector("#play");
  const play = () => { for (const video of videos) { video.currentTime = 0; video.play().catch(() => {}); } };
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => {
    if (!button) return;
    button.textContent = playing ? "pause" : "play";
    button.setAttribute("aria-pressed", playing);
    if (playing) play(); else for (const video of videos) video.pause();
  };
  if (button) button.onclick = () => { playing = !playing; show(); };
  for (const video of videos) video.onended = () => {  // all begin again together
    if (playing && videos.every(other => other.ended || other.error)) play();
  };
  const ready = video => video.error || video.readyState > 2 || new Promise(done => {
    for (const name of ["canplay", "error"]) video.addEventListener(name, done, {once: true});
  });
  Promise.all(videos.map(ready)).then(show);
  for (const copy of document.querySelectorAll(".copy")) copy.onclick = () => {
    const text = copy.previousElementSibling, done = () => { copy.textContent = "copied"; };
    navigator.clipboard?.writeText(text.textContent).then(done, () => getSelection().selectAllChildren(text));
  };
</script>
</html>
"""
)


@dataclass(frozen=True)
class ShownClip:
    """A clip of one model: what it is, as a small MP4, how near it is to the dense one, and its file."""

    label: str
    video: bytes
    psnr: str = ""
    file: str = ""

    @property
    def source(self) -> str:
        """The small MP4 as a data URI."""
        return data_uri(self.video)


@dataclass(frozen=True)
class ClipRow:
    """The clips of a prompt: the dense model's, and those of the student at several steps."""

    caption: str
    clips: list[ShownClip]


@dataclass(frozen=True)
class ShownChart:
    """A chart as an SVG element, and what it shows in words."""

    svg: str
    label: str


@dataclass(frozen=True)
class TrainingPage:
    """What the page of a training shows.

    Args:
        verdict: whether it helped, in a sentence. notes: sentences below it.
        commands: what to run next, each with what it is for. facts: of the run, by name.
        layers: error of self-attention in each layer, before and after.
    """

    title: str
    verdict: str
    notes: list[str]
    rows: list[ClipRow]
    charts: list[ShownChart]
    commands: list[tuple[str, str]]
    facts: dict[str, str]
    layers: list[tuple[float, float]]

    def render(self) -> str:
        """The HTML."""
        return render(TRAINING, **vars(self))
