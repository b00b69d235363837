"""Data sets of videos: what is read, what is cut from it, and that all faults are told at once."""

import json

import numpy as np
import pytest
from conftest import needs

from slagen.errors import EnvironmentProblem, UsageError
from slagen.footage import Cut, plan_cuts, read_cut, read_footage

av = needs("av", "slagen[finetune]")
FULL = Cut(64, 48, 17, 8)


def write_video(path, levels, times_ms, size=(64, 48), sound=False):
    """A video whose frame i is plain grey `levels[i]`, shown from times_ms[i] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "1"}
        if sound:
            container.add_stream("aac", rate=44100)
        for level, time in zip(levels, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_frames_are_those_shown_at_their_times(tmp_path):
    """Timestamps of a variable rate: 25 frames a second at first, then slow; the clip has 8 a second."""
    times = [*range(0, 1000, 40), *range(1000, 3001, 500)]
    levels = [10 + 7 * i for i in range(len(times))]
    write_video(tmp_path / "a.mp4", levels, times)
    clip = read_cut(tmp_path / "a.mp4", FULL)
    assert clip.shape == (17, 48, 64, 3)
    shown = [max(i for i, time in enumerate(times) if time <= 125 * k) for k in range(17)]
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [levels[i] for i in shown], atol=3)


def test_a_slow_video_repeats_frames_and_a_short_one_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", [50, 150, 200], [0, 1000, 2000])
    clip = read_cut(tmp_path / "a.mp4", FULL)
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [50] * 8 + [150] * 8 + [200], atol=3)
    with pytest.raises(UsageError, match="gives 17 frames at 8 a second, but 21 are needed"):
        read_cut(tmp_path / "a.mp4", Cut(64, 48, 21, 8))


def test_sizes_and_lengths_fall_into_few_buckets(tmp_path):
    cuts = {}
    for name, size, seconds in (("wide", (128, 96), 3), ("tall", (96, 128), 1.2), ("square", (80, 80), 0.6)):
        write_video(tmp_path / f"{name}.mp4", [0, 100, 200], [0, int(500 * seconds), int(1000 * seconds)], size)
        (tmp_path / f"{name}.txt").write_text("a circle")
    footage = read_footage(tmp_path)
    cuts = {item.path.stem: cut for item, cut in zip(footage, plan_cuts(footage, FULL, 16), strict=True)}
    assert cuts["wide"] == FULL
    assert (cuts["tall"].width, cuts["tall"].height, cuts["tall"].num_frames) == (48, 64, 9)
    assert (cuts["square"].width, cuts["square"].height, cuts["square"].num_frames) == (48, 48, 5)
    assert all(
        read_cut(item.path, cuts[item.path.stem]).shape[0] == cuts[item.path.stem].num_frames for item in footage
    )


def test_cropped_around_the_middle(tmp_path):
    """A wide picture with a white middle: what is left and right of it goes."""
    picture = np.zeros((48, 128, 3), np.uint8)
    picture[:, 40:88] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = read_cut(tmp_path / "a.mp4", Cut(48, 48, 5, 8))
    assert clip[:, :, 4:-4].mean() > 240


def test_four_kinds_of_lists_mean_the_same(tmp_path):
    for name in ("one", "two"):
        write_video(tmp_path / f"{name}.mp4", [0, 255], [0, 2000])
    expected = {("one.mp4", "a red circle"), ("two.mp4", 'a "blue", square')}
    lists = {
        "musubi": ("data.jsonl", "\n".join(json.dumps({"video_path": v, "caption": c}) for v, c in expected)),
        "fastvideo": ("videos2caption.json", json.dumps([{"path": v, "cap": [c]} for v, c in expected])),
        "diffsynth": ("metadata.csv", '\ufeffvideo,prompt\none.mp4,a red circle\ntwo.mp4,"a ""blue"", square"\n'),
    }
    for kind, (name, text) in lists.items():
        folder = tmp_path / kind
        (folder / "videos").mkdir(parents=True)
        for video in ("one.mp4", "two.mp4"):
            place = folder / "videos" if kind == "fastvideo" else folder
            (place / video).write_bytes((tmp_path / video).read_bytes())
        (folder / name).write_text(text, encoding="utf-8")
        for given in (folder, folder / name):
            assert {(item.path.name, item.caption) for item in read_footage(given)} == expected, kind
    folder = tmp_path / "plain" / "deeper"
    folder.mkdir(parents=True)
    for video, caption in expected:
        (folder / video).write_bytes((tmp_path / video).read_bytes())
        (folder / video).with_suffix(".txt").write_text(caption + "\n")
    assert {(item.path.name, item.caption) for item in read_footage(tmp_path / "plain")} == expected


def test_every_fault_is_told_at_once(tmp_path):
    write_video(tmp_path / "good.mp4", [0, 255], [0, 2000])
    write_video(tmp_path / "short.mp4", [0, 255], [0, 100])
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    lines = [{"video_path": f"{name}.mp4", "caption": "a"} for name in ("good", "short", "sound", "broken", "empty")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError) as caught:
        plan_cuts(read_footage(tmp_path), FULL, 16)
    text = str(caught.value)
    assert text.startswith("the data set has 4 faults")
    for part in ("data.jsonl:2: short.mp4 is 0.10 s long", "data.jsonl:3: sound.mp4 has sound but no pictures",
                 "data.jsonl:4: broken.mp4 cannot be decoded", "data.jsonl:5: empty.mp4 cannot be dec"):  # fmt: skip
        assert part in text
    lines = [{"caption": "a"}, {"video_path": "good.mp4"}, {"video_path": "good.mp4", "caption": " "}, 7,
             {"video_path": "gone.mp4", "caption": "a"}]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match="has 5 faults") as caught:
        read_footage(tmp_path)
    assert "data.jsonl:3: has no caption" in str(caught.value) and "data.jsonl:5: gone.mp4 does not" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "{", "a.jsonl:1: is no JSON"), ("a.jsonl", "", "names no video"),
        ("metadata.csv", "a,b\n1,2\n", "lacks a column"), ("videos2caption.json", "{}", "no list of videos"),
        ("a.txt", "x", "no list of videos"), ("a.csv", b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)  # fmt: skip
def test_lists_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_footage(tmp_path / name)


def test_folders_without_a_set(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_footage(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no videos"):
        read_footage(tmp_path)
    write_video(tmp_path / "a.mp4", [0], [0])
    write_video(tmp_path / "b.mp4", [0], [0])
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(UsageError, match="2 faults"):
        read_footage(tmp_path)


def test_without_pyav(tmp_path, monkeypatch):
    import sys

    write_video(tmp_path / "a.mp4", [0, 1], [0, 2000])
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentProblem, match=r"slagen\[finetune\]"):
        plan_cuts(read_footage(tmp_path), FULL, 16)
