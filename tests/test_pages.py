"""The contact sheet and the page of a training in a real browser, opened from disk."""

import re
import shutil
from functools import partial

import numpy as np
import pytest

from slagen.generation.side_by_side import part_of, side_by_side
from slagen.html.contact_sheet import Card, contact_sheet
from slagen.training.log import CLIPS, StepRecord, ValidationRecord, add_line
from slagen.training.page import Trained, verdict, write_page
from slagen.video import make_thumbnail, write_video

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPTS = ["zebra", "apple & <b>pear</b>", "红色的圆", "\"quoted\" 'prompt'", "mango", "kiwi 🥝"]


def sheet(tmp_path):
    rng = np.random.default_rng(0)
    cards = []
    for index, prompt in enumerate(PROMPTS, 1):
        frames = np.full((17, 64, 96, 3), rng.integers(0, 255, 3), np.uint8)
        frames[:, :, 5 * index] = np.arange(17)[:, None, None] * 15
        write_video(frames, tmp_path / f"{index}.mp4", 16)
        thumbnail = make_thumbnail(tmp_path / f"{index}.mp4")
        cards.append(
            Card(
                index, f"{index}.mp4", prompt, (7 * index) % 5, "done", thumbnail, 10.5 - index, index % 3 / 4,
                {"prompt": prompt, "steps": 3, "model": "tiny & <i>wan</i>"}, [(10, 2), (20, 10), (15, 0)],
            )
        )  # fmt: skip
    cards.append(Card(len(PROMPTS) + 1, "x.mp4", "failed one", 9, "failed: out of memory", None, None, None))
    cards.append(Card(len(PROMPTS) + 2, "y.mp4", "failed one", 10, "queued", None, None, None))
    path = tmp_path / "index.html"
    path.write_text(contact_sheet("eight videos", cards, "model tiny-wan, attention sla"), encoding="utf-8")
    return path


def training(tmp_path):
    """The page of a run of 20 steps, validated before and after, with two prompts."""
    add = partial(add_line, tmp_path)
    (tmp_path / CLIPS).mkdir()
    rng = np.random.default_rng(0)
    dense = [rng.integers(0, 255, (17, 64, 96, 3), dtype=np.uint8) // 64 * 64 for _ in range(2)]
    for i, clip in enumerate(dense):
        write_video(clip, tmp_path / CLIPS / f"dense-{i}.mp4", 16)
    for step in (0, 5, 10, 15, 20):
        names = [f"step-{step:06d}-{i}.mp4" for i in range(2)]
        for name, clip in zip(names, dense, strict=True):
            student = (clip * (step / 20)).astype(np.uint8)
            write_video(side_by_side([clip, student], ["dense", f"step {step}"]), tmp_path / CLIPS / name, 16)
        add(ValidationRecord(step, 0.6 - step / 50, names))
    for step in range(1, 21):
        add(StepRecord(step, 20, 1 / step, 0.5, 1.0, 1e-5, [step, 2 * step], 1e3, 0.0, step, 20 - step))
    layers = {"before": [0.5, 0.6], "after": [0.2, 0.7]}
    commands = [("A video", "slagen generate x"), ("Beside dense", "slagen compare x")]
    return write_page(tmp_path, Trained("a <run>", 0.6, 0.2, layers, PROMPTS[:2], 16, {"steps": "20"}, commands))


@pytest.fixture(params=[sheet])
def page(tmp_path, request):
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    faults = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1100, "height": 900}, offline=True, bypass_csp=True)
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
        page.goto(request.param(tmp_path).as_uri())
        yield page
        browser.close()
    assert faults == []


SMALL = "[...document.querySelectorAll('video:not(dialog video)')]"
PLAYING = f"{SMALL}.map(v => v.readyState > 1 && !v.paused && v.currentTime > 0)"


@pytest.mark.parametrize("page", [training], indirect=True)
def test_a_training_is_shown_with_its_curves_and_clips(page, tmp_path):
    page.wait_for_function(f"(v => v.length === 8 && v.every(Boolean))({PLAYING})", timeout=20_000)
    rows = page.evaluate("[...document.querySelectorAll('.row')].map(r => r.innerText.replace(/\\n+/g, ' '))")
    labels = r"dense before training PSNR to dense [\d.]+ dB step 10 PSNR to dense [\d.]+ dB step 20 (PSNR|identical).*"
    assert len(rows) == 2 and all(re.fullmatch(labels, row) for row in rows)
    assert page.evaluate("[...document.querySelectorAll('video')].map(v => [v.videoWidth, v.videoHeight])") == 8 * [
        [96, 64]
    ]
    page.get_by_role("button", name="pause").press("Enter")
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
    said = page.locator(".verdict").inner_text()
    assert "fell from 0.6000 to 0.2000 (67% lower), and the clips below came nearer to" in said
    assert page.get_by_text(
        "Self-attention got worse in 1 of 2 layers: layer 1 (0.6000 before, 0.7000 after)"
    ).is_visible()
    assert page.locator("code").all_inner_texts() == ["slagen generate x", "slagen compare x"]
    assert page.locator("svg").count() == 5
    inks = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    own = "getComputedStyle(document.body).color"
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert set(page.evaluate(inks)) == {page.evaluate(own)}
    for box in page.evaluate("[...document.querySelectorAll('.charts svg')].map(s => s.getBoundingClientRect())"):
        assert box["width"] > 300 and box["height"] > 100
    assert page.get_by_role("heading", name="a <run>").is_visible() and page.locator("run").count() == 0
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) == 8 and all((tmp_path / link).is_file() for link in links)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (480, 832)])
def test_a_clip_is_cut_out_of_those_beside_it(height, width):
    clips = [np.full((2, height, width, 3), value, np.uint8) for value in (50, 90, 130)]
    both = side_by_side(clips, ["dense", "b", "c"])
    assert all((part_of(both, i, height, width) == clip).all() for i, clip in enumerate(clips))


@pytest.mark.parametrize(("before", "after", "nearness", "told"), [
    (0.4, 0.2, (20.0, 22.0), ["Training helped:", "fell from 0.4000 to 0.2000 (50% lower), and", "nearer to"]),
    (0.4, 0.2, (22.0, 20.0), ["Training helped:", "but the clips below came further from"]),
    (0.4, 0.2, (22.0, 22.1), ["Training helped:", "about as near to the dense model's as before"]),
    (0.2, 0.4, (20.0, 22.0), ["Training made it worse:", "rose from 0.2000 to 0.4000, but", "nearer to"]),
    (0.2, 0.4, (22.0, 20.0), ["Training made it worse:", "and the clips below came further from"]),
    (0.4, 0.4, (22.0, 20.0), ["Training changed little:", "stayed at 0.4000", "but the clips below came further"]),
    (0.4, 0.2, None, ["Training helped:", "(50% lower)."]),
    (0.0, 0.1, (float("inf"), 20.0), ["Training made it worse:", "PSNR without limit before"]),
    (0.0, 0.0, (float("inf"), float("inf")), ["Training changed little:", "about as near"]),
])  # fmt: skip
def test_the_verdict_agrees_with_the_numbers_and_the_clips(before, after, nearness, told):
    said = verdict(before, after, nearness)
    assert all(words in said for words in told), said


def test_every_thumbnail_plays_and_sorting_works(page):
    page.wait_for_function(f"(v => v.length === {len(PROMPTS)} && v.every(Boolean))({PLAYING})", timeout=20_000)
    assert page.evaluate("[...document.querySelectorAll('main video')].map(v => v.videoWidth)") == [96] * len(PROMPTS)

    def shown(name):
        return page.evaluate(f"[...document.querySelectorAll('figure')].map(f => f.dataset.{name})")

    assert sorted(shown("prompt")) == sorted([*PROMPTS, "failed one", "failed one"])
    orders = {"seed": "seed", "time": "seconds", "attention": "attention", "original order": "index"}
    for label, name in orders.items():
        button = page.get_by_role("button", name=label, exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        values = [float(value) for value in shown(name)]
        values.remove(10.0 if name == "seed" else 8.0 if name == "index" else 0.0)  # beside the other of its prompt
        assert values == sorted(values) and len(set(values)) > 2
        button.click()
        values = [float(value) for value in shown(name)]
        values.remove(9.0 if name == "seed" else 7.0 if name == "index" else 0.0)
        assert values == sorted(values, reverse=True)
    page.get_by_role("button", name="prompt", exact=True).click()
    latin = [prompt for prompt in shown("prompt") if prompt[0].isascii() and prompt[0].isalpha()]
    assert latin == ["apple & <b>pear</b>", "failed one", "failed one", "kiwi 🥝", "mango", "zebra"]
    page.wait_for_function(f"{PLAYING}.every(Boolean)", timeout=20_000)  # moved elements go on
    assert page.locator("b").count() == 0  # a prompt is words, never markup


def test_a_failed_job_says_why(page):
    assert page.get_by_text("failed: out of memory").is_visible()
    assert page.locator("main video").count() == len(PROMPTS)


def test_search_leaves_what_has_every_word(page):
    def shown():
        return page.evaluate("[...document.querySelectorAll('figure')].filter(f => f.offsetParent).length")

    box = page.get_by_label("search")
    for text, count in (("pear", 1), ("seed 2 9.5", 1), ("quoted prompt", 1), ("nothing", 0), ("", len(PROMPTS) + 2)):
        box.fill(text)
        assert shown() == count, text


def test_variants_of_a_prompt_stand_in_a_row_and_a_click_shows_one_large(page):
    tops = page.evaluate("[...document.querySelectorAll('.variants figure')].map(f => f.getBoundingClientRect().top)")
    assert len(tops) == 2 and len(set(tops)) == 1
    page.get_by_role("button", name="show 2.mp4 large").press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading", name=PROMPTS[1]).is_visible()
    assert dialog.locator("code").inner_text() == "slagen replay 2.mp4"
    assert dialog.locator("tr").all_inner_texts() == ["steps\t3", "model\ttiny & <i>wan</i>"]
    bars = page.evaluate("[...document.querySelectorAll('dialog rect')].map(r => Number(r.getAttribute('height')))")
    assert bars == pytest.approx([45, 9, 90, 45, 67.5, 0])
    page.wait_for_function("document.querySelector('dialog video').readyState > 1", timeout=20_000)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_the_header_has_what_all_videos_share(page):
    assert page.get_by_text("model tiny-wan, attention sla").is_visible()
