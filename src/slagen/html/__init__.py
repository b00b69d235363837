"""Pages that open from disk, without a server or a network: everything they show is inside them."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment

from slagen.io.paths import GIF, VIDEO, WEBM
from slagen.io.text import escaped

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
  script-src 'unsafe-inline'; img-src data:; media-src data: file:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{{ generator or 'slagen' }}">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
  body { margin: 0 auto; max-width: 1200px; padding: 1.5rem; }
  figure { margin: 0; border: 1px solid #8884; border-radius: .5rem; overflow: hidden; }
  video { display: block; width: 100%; }
  a { color: inherit; }
"""


def render(page: str, **content: Any) -> str:
    """The HTML of a Jinja template; every text in it is escaped."""
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "finalize": _harmless}
    return Environment(**options).from_string(page).render(**content)


def _harmless(value: Any) -> Any:
    return escaped(value) if type(value) is str else value


TYPES = {VIDEO: "video/mp4", WEBM: "video/webm", GIF: "image/gif"}


def data_uri(video: bytes, kind: str = VIDEO) -> str:
    """A video of a kind as a data URI."""
    return f"data:{TYPES[kind]};base64,{base64.b64encode(video).decode()}"
