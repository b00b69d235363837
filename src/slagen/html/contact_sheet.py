"""The page of a batch: every video, small and playing; a click shows it large, with how it was made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from slagen.html import HEAD, data_uri, render

SHEET = (
    HEAD
    + """\
  header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
  h1 { font-size: 1.2rem; margin: 0 auto 0 0; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
  .about { flex-basis: 100%; margin: 0; opacity: .8; overflow-wrap: anywhere; }
  button, input { font: inherit; padding: .2rem .7rem; border: 1px solid #8888; border-radius: 1rem; background: none;
    color: inherit; }
  button { cursor: pointer; }
  button[aria-pressed=true] { background: #1f6feb; color: white; border-color: #1f6feb; }
  button:focus-visible, input:focus-visible { outline: 2px solid #1f6feb; outline-offset: 2px; }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; margin-top: 1rem;
    align-items: start; }
  section { display: contents; }
  section.variants { display: grid; grid-column: 1 / -1; grid-auto-flow: column; gap: 1rem;
    grid-auto-columns: minmax(160px, 252px); overflow-x: auto; align-items: start; }
  section[hidden] { display: none; }
  .open { display: block; width: 100%; padding: 0; border: 0; border-radius: 0; }
  figcaption { padding: .5rem .7rem .7rem; overflow-wrap: anywhere; }
  .prompt { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
  .facts { opacity: .8; font-size: .85rem; margin-top: .3rem; }
  .failed { padding: 1rem .7rem; }
  dialog { max-width: min(900px, 96vw); width: 100%; max-height: 96vh; border: 1px solid #8888; border-radius: .5rem; }
  dialog video { max-height: 60vh; object-fit: contain; background: #0003; }
  dialog form { float: right; } dialog svg { width: 100%; height: 90px; display: block; }
  dialog table { width: 100%; border-collapse: collapse; }
  dialog th, dialog td { text-align: left; vertical-align: top; padding: .1rem .6rem .1rem 0; overflow-wrap: anywhere; }
  code { overflow-wrap: anywhere; }
</style>
<header>
  <h1>{{ title }}</h1>
  <label>search <input type="search" id="search"></label>
  <span>sort by</span>
  {% for name, label in orders %}
  <button type="button" data-by="{{ name }}" aria-pressed="{{ 'true' if name == 'index' else 'false' }}">{{ label }}\
</button>
  {% endfor %}
  {% if about %}<p class="about">{{ about }}</p>{% endif %}
</header>
<main>
{% for group in groups %}
<section{% if group|length > 1 %} class="variants" tabindex="0" aria-label="{{ group[0].prompt }}"{% endif %}>
{% for row in group %}
  <figure data-index="{{ row.index }}" data-prompt="{{ row.prompt }}" data-seed="{{ row.seed }}"
    data-seconds="{{ row.seconds or 0 }}" data-attention="{{ row.attention_share or 0 }}" data-about="{{ row.about }}">
    {% if row.thumbnail %}
    <button type="button" class="open" aria-label="show {{ row.file }} large">
      <video src="{{ row.thumbnail }}" autoplay loop muted playsinline></video></button>
    {% else %}<div class="failed">{{ row.state }}</div>{% endif %}
    <figcaption>
      <div class="prompt" title="{{ row.prompt }}">{{ row.prompt }}</div>
      <div class="facts">seed {{ row.seed }}{% if row.seconds %}, {{ "%.1f"|format(row.seconds) }} s{% endif %}
        {%- if row.attention_share %}, attention {{ "%.0f"|format(100 * row.attention_share) }} %{% endif %}
        {%- if row.thumbnail %}<br><a href="./{{ row.file|urlencode }}">{{ row.file }}</a>{% endif %}</div>
    </figcaption>
  </figure>
{% endfor %}
</section>
{% endfor %}
</main>
<dialog aria-labelledby="large-prompt">
  <form method="dialog"><button>close</button></form>
  <h2 id="large-prompt"></h2>
  <video controls loop muted playsinline></video>
  <svg viewBox="0 0 600 90" preserveAspectRatio="none" role="img"></svg>
  <p>To make it again: <code></code> <button type="button" id="copy">copy</button></p>
  <table><tbody></tbody></table>
</dialog>
<script>
  const main = document.querySelector("main"), buttons = [...document.querySelectorAll("button[data-by]")];
  const groups = () => [...main.children], cards = group => [...group.querySelectorAll("figure")];
  const replay = () => main.querySelectorAll("video").forEach(video => video.play().catch(() => {}));
  let by = "index", down = false;
  for (const button of buttons) button.onclick = () => {
    down = by === button.dataset.by && !down;
    by = button.dataset.by;
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    const value = card => by === "prompt" ? card.dataset.prompt : Number(card.dataset[by]);
    const compare = (a, b) => by === "prompt" ? a.localeCompare(b) : a - b;
    const order = (a, b) => (down ? -1 : 1) * compare(value(a), value(b));
    for (const group of groups()) group.append(...cards(group).sort(order));
    main.append(...groups().sort((a, b) => order(cards(a)[0], cards(b)[0])));
    replay();  // moved elements stop
  };
  document.querySelector("#search").oninput = event => {
    const words = event.target.value.toLowerCase().split(/\\s+/);
    for (const group of groups()) {
      const text = cards(group).map(card => card.innerText + card.dataset.prompt).join(" ").toLowerCase();
      group.hidden = !words.every(word => text.includes(word));
    }
  };
  const dialog = document.querySelector("dialog"), large = dialog.querySelector("video");
  const chart = steps => {
    const top = Math.max(...steps.map(step => step[0])), width = 600 / steps.length;
    return steps.map(([ms, attention], i) => [[ms, "#a8b0b9"], [attention, "#1f6feb"]].map(([value, colour]) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect"), height = 90 * value / top;
      for (const [name, x] of Object.entries({x: i * width, y: 90 - height, width: width * .8, height, fill: colour}))
        bar.setAttribute(name, x);
      return bar;
    })).flat();
  };
  for (const button of document.querySelectorAll(".open")) button.onclick = () => {
    const card = button.closest("figure"), about = JSON.parse(card.dataset.about), svg = dialog.querySelector("svg");
    dialog.querySelector("h2").textContent = card.dataset.prompt;
    large.src = about.file;
    large.onerror = () => { large.onerror = null; large.src = button.querySelector("video").src; };
    svg.hidden = !about.steps.length;
    svg.replaceChildren(...(about.steps.length ? chart(about.steps) : []));
    svg.setAttribute("aria-label", about.steps.length + " steps; attention in blue");
    dialog.querySelector("code").textContent = about.command;
    dialog.querySelector("tbody").replaceChildren(...Object.entries(about.settings).map(([name, value]) => {
      const [row, head, cell] = ["tr", "th", "td"].map(tag => document.createElement(tag));
      head.scope = "row"; head.textContent = name; cell.textContent = value; row.append(head, cell);
      return row;
    }));
    dialog.showModal();
    large.play().catch(() => {});
  };
  dialog.onclose = () => large.removeAttribute("src");
  document.querySelector("#copy").onclick = event => {
    const text = dialog.querySelector("code"), done = () => { event.target.textContent = "copied"; };
    navigator.clipboard?.writeText(text.textContent).then(done, () => getSelection().selectAllChildren(text));
  };
</script>
</html>
"""
)
ORDERS = (
    ("index", "original order"), ("prompt", "prompt"), ("seed", "seed"), ("seconds", "time"),
    ("attention", "attention"),
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """One video of a contact sheet.

    Args:
        video: a small MP4, or nothing for a job without one; state then says why.
        seconds: that it took. attention_share: of its steps' time, from 0 to 1. Both None where they are not known.
        settings: by option name. steps: of each, its time and its attention time in milliseconds; empty if not known.
    """

    index: int
    file: str
    prompt: str
    seed: int
    state: str
    video: bytes | None
    seconds: float | None
    attention_share: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: Sequence[tuple[float, float]] = ()

    @property
    def thumbnail(self) -> str:
        """The small MP4 as a data URI."""
        return "" if self.video is None else data_uri(self.video)

    @property
    def about(self) -> str:
        """What the large view shows, as JSON."""
        settings = {name: value for name, value in self.settings.items() if value is not None and name != "prompt"}
        return json.dumps({
            "file": f"./{quote(self.file)}", "command": f"slagen replay {shlex.quote(self.file)}",
            "settings": {name: str(value) for name, value in settings.items()}, "steps": [list(x) for x in self.steps],
        })  # fmt: skip


def contact_sheet(title: str, cards: list[Card], about: str = "") -> str:
    """The HTML of a page with a playing thumbnail of every video, searchable and sortable; those of one prompt stand in
    a row.

    Args:
        about: what all videos have in common, such as the model.
    """
    groups: dict[str, list[Card]] = {}
    for card in cards:
        groups.setdefault(card.prompt, []).append(card)
    return render(SHEET, title=title, groups=list(groups.values()), orders=ORDERS, about=about)
