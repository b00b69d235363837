"""The contact sheet in a real browser, opened from disk."""

import shutil

import numpy as np
import pytest

from slagen.pages import Card, contact_sheet
from slagen.video import make_thumbnail, write_mp4

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPTS = ["zebra", "apple & <b>pear</b>", "红色的圆", "\"quoted\" 'prompt'", "mango", "kiwi 🥝"]


def sheet(tmp_path):
    rng = np.random.default_rng(0)
    cards = []
    for index, prompt in enumerate(PROMPTS, 1):
        frames = np.full((17, 64, 96, 3), rng.integers(0, 255, 3), np.uint8)
        frames[:, :, 5 * index] = np.arange(17)[:, None, None] * 15
        write_mp4(frames, tmp_path / "video.mp4", 16)
        thumbnail = make_thumbnail(tmp_path / "video.mp4")
        cards.append(
            Card(index, f"{index}.mp4", prompt, (7 * index) % 5, "done", thumbnail, 10.5 - index, index % 3 / 4)
        )
    cards.append(Card(len(PROMPTS) + 1, "x.mp4", "failed one", 9, "failed: out of memory", None, None, None))
    path = tmp_path / "index.html"
    path.write_text(contact_sheet("seven videos", cards), encoding="utf-8")
    return path


@pytest.fixture
def page(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    faults = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1100, "height": 900}, offline=True)
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
        page.goto(sheet(tmp_path).as_uri())
        yield page
        browser.close()
    assert faults == []


def test_every_thumbnail_plays_and_sorting_works(page):
    playing = "[...document.querySelectorAll('video')].map(v => v.readyState > 1 && !v.paused && v.currentTime > 0)"
    page.wait_for_function(f"{playing}.every(Boolean)", timeout=20_000)
    assert page.evaluate(playing) == [True] * len(PROMPTS)
    assert page.evaluate("[...document.querySelectorAll('video')].map(v => v.videoWidth)") == [96] * len(PROMPTS)

    def shown(name):
        return page.evaluate(f"[...document.querySelectorAll('figure')].map(f => f.dataset.{name})")

    assert sorted(shown("prompt")) == sorted([*PROMPTS, "failed one"])
    for label, name in (("seed", "seed"), ("time", "seconds"), ("attention", "attention"), ("order", "index")):
        button = page.get_by_role("button", name=label, exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        values = [float(value) for value in shown(name)]
        assert values == sorted(values) and len(set(values)) > 2
        button.click()
        assert [float(value) for value in shown(name)] == sorted(values, reverse=True)
    page.get_by_role("button", name="prompt", exact=True).click()
    latin = [prompt for prompt in shown("prompt") if prompt[0].isascii() and prompt[0].isalpha()]
    assert latin == ["apple & <b>pear</b>", "failed one", "kiwi 🥝", "mango", "zebra"]
    page.wait_for_function(f"{playing}.every(Boolean)", timeout=20_000)  # moved elements go on
    assert page.locator("b").count() == 0  # a prompt is words, never markup


def test_a_failed_job_says_why(page):
    assert page.get_by_text("failed: out of memory").is_visible()
    assert page.locator("video").count() == len(PROMPTS)
