"""Pages that open from disk, without a server or a network: everything they show is inside them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment

from slagen.io.text import escaped

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
  script-src 'unsafe-inline'; img-src data:; media-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
  body { margin: 0 auto; max-width: 1200px; padding: 1.5rem; }
  figure { margin: 0; border: 1px solid #8884; border-radius: .5rem; overflow: hidden; }
  video { display: block; width: 100%; }
  a { color: inherit; }
"""

SHEET = (
    HEAD
    + """\
  header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: baseline; }
  h1 { font-size: 1.2rem; margin: 0 auto 0 0; }
  button { font: inherit; padding: .2rem .7rem; border: 1px solid #8888; border-radius: 1rem; background: none;
    color: inherit; cursor: pointer; }
  button[aria-pressed=true] { background: #8883; }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; margin-top: 1rem; }
  video { aspect-ratio: 16 / 10; object-fit: contain; background: #0003; }
  figcaption { padding: .5rem .7rem .7rem; overflow-wrap: anywhere; }
  .prompt { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
  .facts { opacity: .7; font-size: .85rem; margin-top: .3rem; }
  .failed { padding: 1rem .7rem; }
</style>
<header>
  <h1>{{ title }}</h1>
  <span>sort by</span>
  {% for name, label in orders %}<button type="button" data-by="{{ name }}" aria-pressed="false">{{ label }}</button>
  {% endfor %}
</header>
<main>
{% for row in rows %}
  <figure data-index="{{ row.index }}" data-prompt="{{ row.prompt }}" data-seed="{{ row.seed }}"
    data-seconds="{{ row.seconds or 0 }}" data-attention="{{ row.attention_share or 0 }}">
    {% if row.thumbnail %}<video src="{{ row.thumbnail }}" autoplay loop muted playsinline></video>
    {% else %}<div class="failed">{{ row.state }}</div>{% endif %}
    <figcaption>
      <div class="prompt" title="{{ row.prompt }}">{{ row.prompt }}</div>
      <div class="facts">seed {{ row.seed }}{% if row.seconds %}, {{ "%.1f"|format(row.seconds) }} s{% endif %}
        {%- if row.attention_share %}, attention {{ "%.0f"|format(100 * row.attention_share) }} %{% endif %}
        {%- if row.thumbnail %}<br><a href="./{{ row.file|urlencode }}">{{ row.file }}</a>{% endif %}</div>
    </figcaption>
  </figure>
{% endfor %}
</main>
<script>
  const main = document.querySelector("main"), buttons = [...document.querySelectorAll("button")];
  let by = "", down = false;
  for (const button of buttons) button.onclick = () => {
    down = by === button.dataset.by && !down;
    by = button.dataset.by;
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    const value = card => by === "prompt" ? card.dataset.prompt : Number(card.dataset[by]);
    const order = (a, b) => by === "prompt" ? value(a).localeCompare(value(b)) : value(a) - value(b);
    main.append(...[...main.children].sort((a, b) => (down ? -1 : 1) * order(a, b)));
    for (const video of main.querySelectorAll("video")) video.play().catch(() => {});  // moved elements stop
  };
</script>
</html>
"""
)
ORDERS = (("index", "order"), ("prompt", "prompt"), ("seed", "seed"), ("seconds", "time"), ("attention", "attention"))


@dataclass(frozen=True)
class Card:
    """One video of a contact sheet.

    Args:
        video: a small MP4, or nothing for a job without one; state then says why.
        seconds: that it took. attention_share: of its steps' time, from 0 to 1. Both None where they are not known.
    """

    index: int
    file: str
    prompt: str
    seed: int
    state: str
    video: bytes | None
    seconds: float | None
    attention_share: float | None

    @property
    def thumbnail(self) -> str:
        """The small MP4 as a data URI."""
        return "" if self.video is None else data_uri(self.video)


def contact_sheet(title: str, cards: list[Card]) -> str:
    """The HTML of a page with a playing thumbnail of every video, sortable."""
    return render(SHEET, title=title, rows=cards, orders=ORDERS)


def render(page: str, **content: Any) -> str:
    """The HTML of a Jinja template; every text in it is escaped."""
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "finalize": _harmless}
    return Environment(**options).from_string(page).render(**content)


def _harmless(value: Any) -> Any:
    return escaped(value) if type(value) is str else value


def data_uri(video: bytes) -> str:
    """An MP4 as a data URI."""
    return "data:video/mp4;base64," + base64.b64encode(video).decode()
