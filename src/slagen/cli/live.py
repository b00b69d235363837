"""The live display of a run: two lines for each worker, what it does and how far that is, at any width."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from slagen.cli.table import Segments
from slagen.io.text import columns_of, encodable, line, wrapped

if TYPE_CHECKING or find_spec("rich") is not None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def live(console: Any, shown: Callable[[], list[Segments]]) -> Any:
        """A display that asks for its lines several times a second; `start` and `stop` it."""
        group = lambda: Group(*(Text.assemble(*row, no_wrap=True, overflow="crop") for row in shown()))  # noqa: E731
        return Live(get_renderable=group, console=console, transient=True, refresh_per_second=8)

else:
    from slagen.cli.plain import live  # noqa: F401

BAR, MIN_BAR = 40, 8  # columns of a bar, at most and where there is room for anything else
GAP = "  "
UNKNOWN = "-:--"


class Pace:
    """How many parts of something are done, and how long the rest takes at the pace so far.

    The first part counts only until there is a second one: it often takes longer, to compile or to read files.
    """

    def __init__(self, total: int, now: float, done: int = 0) -> None:
        self.total, self.done = total, done
        self._began, self._first = (now, done), (now, done)
        self._last = now
        self._told: tuple[float, float] | None = None

    def advance(self, done: int, now: float, left_s: float | None = None) -> None:
        """So many are done now; left_s: until all are, where that is known better."""
        if self.done == self._began[1] and done > self.done:
            self._first = now, done
        self.done, self._last = done, now
        self._told = None if left_s is None else (now, left_s)

    @property
    def seconds_each(self) -> float | None:
        """None before the first part is done."""
        if self._told is not None and self.done < self.total:
            return self._told[1] / (self.total - self.done)
        since = self._first if self.done > self._first[1] else self._began
        return (self._last - since[0]) / (self.done - since[1]) if self.done > since[1] else None

    def left_s(self, now: float) -> float | None:
        """Seconds until all parts are done; None where nothing is known of it."""
        if self._told is not None:
            return max(0.0, self._told[1] - (now - self._told[0]))
        each = self.seconds_each
        return None if each is None else max(0.0, each * (self.total - self.done) - (now - self._last))


@dataclass
class Activity:
    """What a worker does.

    Args:
        text: the first line. began: when, by the clock that all of this is by.
        pace: of its parts; None where they are not counted. unit: what a part is called; "" where parts differ.
        facts: for the end of the second line, the most important first.
        of_all: pace of the videos or clips of which this is one.
    """

    text: str
    began: float
    pace: Pace | None = None
    unit: str = ""
    facts: list[str] = field(default_factory=list)
    of_all: Pace | None = None


def lines_of(activities: Mapping[int, Activity], width: int, height: int, now: float, encoding: str) -> list[Segments]:
    """Two lines for each activity, those of `worker 1` and so on by their number; as many as the terminal has room for.

    Args:
        width, height: columns and rows of the terminal. encoding: of the stream.
    """
    room = max(1, (height - 1) // 2)
    rows: list[Segments] = []
    shown = sorted(activities.items())
    for worker, activity in shown[:room]:
        text = line(f"worker {worker}: {activity.text}" if worker > 0 else activity.text)
        rows += [[(fitting(encodable(text, encoding), width), "")], _bar_line(activity, width, now, encoding)]
    if len(shown) > room:
        rows[-1:] = [[(fitting(f"and {len(shown) - room} more workers", width), "dim")]]
    return rows


def _bar_line(activity: Activity, width: int, now: float, encoding: str) -> Segments:
    """The bar and the time left, and of the other facts as many, from the left, as there is room for."""
    pace, each = activity.pace, None if activity.pace is None else activity.pace.seconds_each
    left_s = None if pace is None else pace.left_s(now)
    left = f"{clock(left_s)} left"
    facts = [] if pace is None else [f"{pace.done}/{pace.total}"]
    if each is not None and activity.unit:
        facts.append(f"{readable_pace(each)}/{activity.unit}")
    extras = list(activity.facts)
    if activity.of_all is not None and (all_s := activity.of_all.left_s(now)) is not None:
        extras.insert(0, f"{clock(max(all_s, left_s or 0.0))} left in all")
    if pace is None:
        extras.insert(0, f"{clock(now - activity.began)} so far")

    def needed() -> int:
        return MIN_BAR + sum(len(GAP) + columns_of(fact) for fact in (*facts, left, *extras))

    while (extras or facts) and needed() > width:
        (extras or facts).pop()
    length = max(1, min(BAR, width - needed() + MIN_BAR))
    text = "".join(GAP + fact for fact in (*facts, left, *extras))
    return [*_bar(pace, length, now, encoding), (encodable(text, encoding)[: width - length], "")]


def _bar(pace: Pace | None, length: int, now: float, encoding: str) -> Segments:
    """A bar of so many columns; where nothing is counted, a piece that wanders along it."""
    full, rest = bar_characters(encoding)
    if pace is None or not pace.total:
        size = max(1, length // 4)
        at = int(now * 8) % (length - size + 1)
        return [(rest * at, "dim"), (full * size, "cyan"), (rest * (length - size - at), "dim")]
    done = min(length, length * pace.done // pace.total)
    return [(full * done, "cyan"), (rest * (length - done), "dim")]


def bar_characters(encoding: str | None) -> tuple[str, str]:
    """What a bar is drawn with, and what its rest, on a stream of this encoding."""
    return ("━", "─") if encodable("━─", encoding) == "━─" else ("#", "-")


def fitting(text: str, width: int) -> str:
    """Text of at most so many columns: of a longer one the last words are left out, and a quote is closed again."""
    if columns_of(text) <= width:
        return text
    quoted = re.search(r"(?<!\w)'", text) if text.endswith("'") else None
    first = wrapped(text[: 2 * width], max(1, width - len(" ...'")))[0]
    end = "'" if quoted and len(first) > quoted.start() else ""
    return f"{first} ...{end}" if columns_of(first) + 4 + len(end) <= width else "..."[:width]


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def readable_pace(seconds: float) -> str:
    """Seconds with three digits, or milliseconds."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
