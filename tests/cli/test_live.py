"""The live display: two lines for each worker, at any width, of what a run does and how far that is."""

import io
import re
from types import SimpleNamespace

import pytest

from slagen.cli import console, live, progress
from slagen.cli.live import Activity, Pace, fitting, lines_of
from slagen.events import Event, nth
from slagen.training.log import StepRecord

PROMPT = "a red fox with a wonderfully bushy tail in the deep snow of a northern forest"
WIDTHS = (20, 30, 40, 60, 80, 140)


def step(index):
    return SimpleNamespace(index=index, attention_share=0.41)


def of_generate(show):
    show(Event("run", num_steps=2, done=0, about=nth("video", 1, 2, PROMPT)))
    show(Event("run", num_steps=2, done=1, about=nth("video", 2, 2, PROMPT)))
    show(Event("stage", "denoise", num_steps=16))
    for index in range(7):
        show(Event("step", "denoise", step(index), 16))


def of_decoding(show):
    show(Event("run", about=nth("video", 1, 1, PROMPT)))
    show(Event("stage", "decode", num_steps=21))
    show(Event("part", num_steps=21, done=1))
    show(Event("part", num_steps=21, done=2))


def of_loading(show):
    show(Event("stage", "load"))
    show(Event("part", "loading the text encoder", num_steps=3, done=2))


def of_batch(show):
    text = f"3 of 20 done, about 12 min left: {PROMPT}"
    show(Event("job", text, num_steps=20, done=3, about=nth("video", 4, 20, PROMPT), left_s=725.0))
    show(Event("stage", "denoise", num_steps=50))
    show(Event("step", "denoise", step(0), 50))


def of_ray(show):
    show(Event("job", "x", worker=2, num_steps=20, done=3, about=nth("video", 4, 20, PROMPT)))
    show(Event("stage", "denoise", worker=2, num_steps=50))


def of_training(show):
    show(Event("stage", "train", num_steps=60))
    show(StepRecord(7, 60, 4.1e-2, 0.2123, 0.1, 1e-4, [0.1, 0.2], 12345.0, 3.0, 80.0, 500.0))


def of_preparing(show):
    for index in (0, 1):
        text = f"encoding clip {index + 1} of 9: a-file-with-a-long-name.mp4"
        show(
            Event("clip", text, num_steps=9, done=index, about=nth("clip", index + 1, 9, "a-file-with-a-long-name.mp4"))
        )


def of_measuring(show):
    show(Event("stage", "measure", num_steps=24, about="the error to the dense teacher after step 30"))


RUNS = {run.__name__: run for run in (
    of_generate, of_decoding, of_loading, of_batch, of_ray, of_training, of_preparing, of_measuring,
)}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    """A display on a terminal of so many columns: what it shows after some events, as lines."""

    def shown(columns, run, encoding="utf-8", height=24):
        clock = iter(range(1000))
        monkeypatch.setattr("slagen.cli.progress.time.monotonic", lambda: float(next(clock)))
        screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        stderr = console.Console(file=screen, force_terminal=True, width=columns + len("^C"), height=height)
        monkeypatch.setattr(console, "stderr", stderr)
        show = progress.GenerateProgress()
        run(show)
        return ["".join(text for text, _ in row) for row in show._shown()]

    return shown


def words(text):
    return [word.strip("',:") for word in text.split()]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_two_lines_at_any_width(terminal, columns, run):
    """The bar and the time left are always there; of the rest whole words and whole facts."""
    what, bar = terminal(columns, run)
    whole_what, whole_bar = terminal(1000, run)
    assert live.columns_of(what) <= columns and live.columns_of(bar) <= columns
    assert re.match("[━─]{4,}  ", bar) and re.search(r"[\d-]:[\d-]{2}(:\d\d)? left(  |$)", bar)
    assert set(bar.split("  ")[1:]) <= set(whole_bar.split("  ")[1:])
    assert set(words(what)) <= {*words(whole_what), "..."}
    assert what.count("'") % 2 == 0 and what.startswith(whole_what.split()[0])


def test_what_is_shown(terminal):
    assert terminal(80, of_generate) == [
        "denoising video 2 of 2: 'a red fox with a wonderfully bushy tail in the ...'",
        "━━━━━━━──────────  7/16  1.00 s/step  0:08 left  0:08 left in all  attention 41%",
    ]
    assert terminal(80, of_batch)[1].split("  ")[1:] == [
        "1/50",
        "1.00 s/step",
        "0:48 left",
        "12:02 left in all",
        "attention 41%",
    ]
    assert terminal(80, of_training) == [
        "training step 7 of 60",
        "━━──────────────────  7/60  9.43 s/step  8:19 left  loss 4.100e-02  error 0.2123",
    ]
    assert terminal(20, of_training) == ["training step 7 ...", "━────────  8:19 left"]
    assert terminal(60, of_ray)[0] == "worker 2: denoising video 4 of 20: 'a red fox with a ...'"
    assert terminal(80, of_loading)[0] == "loading the text encoder"
    assert terminal(80, of_loading)[1].split("  ")[1:] == ["2/3", "-:-- left"]


def test_a_terminal_without_unicode(terminal):
    (what, bar) = terminal(60, of_generate, encoding="ascii")
    assert bar.startswith("###") and "7/16" in bar and what.isascii()


def test_more_workers_than_the_terminal_has_room_for(terminal):
    def begin(show):
        for worker in range(1, 20):
            show(Event("job", "x", worker=worker, about=nth("video", worker, 20, PROMPT)))
            show(Event("stage", "denoise", worker=worker, num_steps=50))

    lines = terminal(80, begin, height=11)
    assert len(lines) == 10 and lines[0].startswith("worker 1: ") and lines[-1] == "and 14 more workers"


def test_the_first_part_counts_only_until_there_is_a_second():
    """The first one compiles kernels and reads files, so that the time left was several times too long."""
    pace = Pace(10, 0.0)
    assert pace.left_s(5.0) is None
    pace.advance(1, 30.0)
    assert pace.seconds_each == 30 and pace.left_s(30.0) == 270
    pace.advance(2, 32.0)
    assert pace.seconds_each == 2 and pace.left_s(33.0) == 15
    pace.advance(3, 34.0, left_s=100.0)
    assert pace.left_s(44.0) == 90


def test_what_is_done_all_together_has_nothing_of_the_clips_before(terminal):
    def prepared(show):
        of_preparing(show)
        show(Event("stage", "train", num_steps=60))

    (what, bar) = terminal(80, prepared)
    assert what == "training" and "in all" not in bar


def test_a_long_prompt_without_spaces_is_left_out_whole():
    assert fitting(f"denoising '{'x' * 200}'", 60) == "denoising ..."
    assert fitting("it's here and 'there too'", 20) == "it's here and ..."
    assert fitting("x" * 30, 20) == "..."


def test_lines_of_shows_nothing_without_activities():
    assert lines_of({}, 80, 24, 0.0, "utf-8") == []
    assert len(lines_of({0: Activity("reading", 0.0)}, 80, 24, 0.0, "utf-8")) == 2
