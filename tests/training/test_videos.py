"""Data sets of videos: what is read, what is cut from it, and that all faults are told at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import needs
from PIL import Image

from slagen.errors import EnvironmentProblem, UsageError
from slagen.training.data.clips import ClipSpec, plan_clips, read_clip
from slagen.training.data.videos import SourceVideo, find_videos

av = needs("av", "slagen[finetune]")
FULL = ClipSpec(64, 48, 17, 8)


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


def look_at(path):
    videos, faults = find_videos(path)
    return plan_clips(videos, FULL, 16, faults)


def test_smaller_videos_keep_their_size(tmp_path):
    """Without enlarging, each clip is of its video's own area, on the grid, and never larger than asked for."""
    sizes = {"tiny": (40, 40), "small": (64, 32), "same": (64, 48), "large": (128, 96)}
    for name, size in sizes.items():
        write_ramp(tmp_path / f"{name}.mp4", size=size)
    videos = [SourceVideo(tmp_path / f"{name}.mp4", "a", name) for name in sizes]
    kept = plan_clips(videos, FULL, 16, upscale=False)
    assert [(clip.width, clip.height) for clip in kept] == [(32, 32), (64, 32), (64, 48), (64, 48)]
    enlarged = plan_clips(videos, FULL, 16)
    assert all(clip.width * clip.height >= 48 * 48 for clip in enlarged)
    assert read_clip(videos[0].path, kept[0]).shape == (kept[0].num_frames, 32, 32, 3)


def test_a_clip_may_be_as_long_as_the_models_own(tmp_path):
    """Of 33 frames the lengths are 33, 21, 13 and 5: a video of 17, which the model makes, lost four of them."""
    write_ramp(tmp_path / "own.mp4", frames=17, fps=8)
    videos, full = [SourceVideo(tmp_path / "own.mp4", "a", "a")], ClipSpec(64, 48, 33, 8)
    assert [clip.num_frames for clip in plan_clips(videos, full, 16, own_length=17)] == [17]
    assert [clip.num_frames for clip in plan_clips(videos, full, 16)] == [13]
    assert [clip.num_frames for clip in plan_clips(videos, FULL, 16, own_length=81)] == [17]


def ffmpeg(*arguments):
    import imageio_ffmpeg

    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def write_ramp(path, frames=48, fps=16, size=(64, 48), step=4, **options):
    """Frame i is plain grey, i steps bright."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "1", **options}
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), step * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_still(path, picture, frames):
    """A picture (H, W, 3) uint8, shown for so many frames at 8 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
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
    clip = read_clip(tmp_path / "a.mp4", FULL)
    assert clip.shape == (17, 48, 64, 3)
    shown = [max(i for i, time in enumerate(times) if time <= 125 * k) for k in range(17)]
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [levels[i] for i in shown], atol=3)


def test_a_slow_video_repeats_frames_and_a_short_one_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", [50, 150, 200], [0, 1000, 2000])
    clip = read_clip(tmp_path / "a.mp4", FULL)
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [50] * 8 + [150] * 8 + [200], atol=3)
    with pytest.raises(UsageError, match="has only 17 frames at 8 fps, but 21 are needed"):
        read_clip(tmp_path / "a.mp4", ClipSpec(64, 48, 21, 8))


def test_sizes_and_lengths_fall_into_few_buckets(tmp_path):
    cuts = {}
    for name, size, seconds in (("wide", (128, 96), 3), ("tall", (96, 128), 1.2), ("square", (80, 80), 0.6)):
        write_video(tmp_path / f"{name}.mp4", [0, 100, 200], [0, int(500 * seconds), int(1000 * seconds)], size)
        (tmp_path / f"{name}.txt").write_text("a circle")
    videos, faults = find_videos(tmp_path)
    cuts = {item.path.stem: cut for item, cut in zip(videos, plan_clips(videos, FULL, 16, faults), strict=True)}
    assert cuts["wide"] == FULL
    assert (cuts["tall"].width, cuts["tall"].height, cuts["tall"].num_frames) == (48, 64, 9)
    assert (cuts["square"].width, cuts["square"].height, cuts["square"].num_frames) == (48, 48, 5)
    assert all(
        read_clip(item.path, cuts[item.path.stem]).shape[0] == cuts[item.path.stem].num_frames for item in videos
    )


@pytest.mark.parametrize("name, fps", [("a.mkv", 16), ("a.mkv", 24), ("a.mp4", 16), ("a.mov", 24), ("a.gif", 10),
                                       ("a.gif", 16)])  # fmt: skip
def test_times_that_a_container_rounds(tmp_path, name, fps):
    """Matroska keeps milliseconds and GIF hundredths: at the video's own rate no frame is lost or shown twice."""
    if name.endswith("gif"):
        write_ramp(tmp_path / "a.mp4", 17, fps, step=14)
        ffmpeg("-i", tmp_path / "a.mp4", tmp_path / name)
    else:
        write_ramp(tmp_path / name, 17, fps)
    (tmp_path / "a.txt").write_text("a")
    videos = [item for item in find_videos(tmp_path)[0] if item.path.name == name]
    (cut,) = plan_clips(videos, ClipSpec(64, 48, 17, fps), 16)
    assert cut.num_frames == 17
    clip = read_clip(tmp_path / name, cut).mean((1, 2, 3))
    np.testing.assert_allclose(clip, [(14 if name.endswith("gif") else 4) * i for i in range(17)], atol=3)
    assert np.all(np.diff(clip) > 0)


def test_pictures_are_as_they_are_to_be_seen(tmp_path):
    """A phone's film lies on its side with a note to turn it; old ones have pixels that are not square."""
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:24, :48] = 255  # upper left
    write_still(tmp_path / "a.mp4", picture, 17)
    for angle, corner in ((0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1))):
        turned = tmp_path / f"{angle}.mp4"
        ffmpeg("-display_rotation", angle, "-i", tmp_path / "a.mp4", "-c", "copy", turned)
        size = (48, 96) if angle % 180 else (96, 48)
        cut = plan_clips([SourceVideo(turned, "a", "a")], ClipSpec(96, 48, 17, 8), 16)[0]
        assert (cut.width, cut.height) == size
        ffmpeg("-i", turned, "-frames:v", 1, tmp_path / f"{angle}.png")  # ffmpeg turns it by itself
        expected = np.asarray(Image.open(tmp_path / f"{angle}.png").convert("RGB")).astype(int)
        clip = read_clip(turned, cut)[0].astype(int)
        assert clip.shape == expected.shape and np.abs(clip - expected).mean() < 4
        half = clip.shape[0] // 2 * corner[0], clip.shape[1] // 2 * corner[1]
        assert clip[half[0] : half[0] + clip.shape[0] // 2, half[1] : half[1] + clip.shape[1] // 2].mean() > 230
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setsar=1/4", tmp_path / "sar.mp4")
    cut = plan_clips([SourceVideo(tmp_path / "sar.mp4", "a", "a")], ClipSpec(96, 48, 17, 8), 16)[0]
    assert (cut.width, cut.height) == (48, 96)
    clip = read_clip(tmp_path / "sar.mp4", cut)[0]
    assert clip[:48, :24].mean() > 230 and clip[:, 24:].mean() < 20


def test_a_trimmed_video_is_as_long_as_what_it_shows(tmp_path):
    """A cut without encoding keeps packets from before its beginning, which are not shown."""
    write_ramp(tmp_path / "long.mp4", 60, 8, g="48", keyint_min="48")
    ffmpeg("-ss", 2, "-i", tmp_path / "long.mp4", "-t", 1.4, "-c", "copy", tmp_path / "a.mp4")
    (cut,) = plan_clips([SourceVideo(tmp_path / "a.mp4", "a", "a")], ClipSpec(64, 48, 33, 8), 16)
    assert cut.num_frames == 13 and len(read_clip(tmp_path / "a.mp4", cut)) == cut.num_frames


def test_a_damaged_video_is_refused_and_does_not_hang(tmp_path):
    write_ramp(tmp_path / "a.mp4", 60, 16, (320, 240))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    start = len(content) * 3 // 10
    content[start : start + len(content) // 6] = bytes(len(content) // 6)
    (tmp_path / "a.mp4").write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from slagen.errors import UsageError\n"
        "from slagen.training.data.clips import ClipSpec, read_clip\n"
        "for _ in range(5):\n"
        "    try: read_clip(Path(sys.argv[1]), ClipSpec(64, 48, 57, 16))\n"
        "    except UsageError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a.mp4 ") == 5  # either it cannot be decoded, or it gives too few frames


def test_names_and_notes_of_any_kind(tmp_path):
    write_ramp(tmp_path / "12:30.mp4", 17, 8)
    (tmp_path / "12:30.txt").write_text("a")
    ffmpeg("-i", tmp_path / "12:30.mp4", "-c", "copy", "-metadata", b"title=caf\xe9".decode("utf-8", "surrogateescape"),
           tmp_path / "b.mkv")  # fmt: skip
    (tmp_path / "b.TXT").write_text("b")
    assert len(look_at(tmp_path)) == 2
    (tmp_path / "c.mp4").write_text("ffconcat version 1.0\nfile b.mkv\n")
    (tmp_path / "c.txt").write_text("c")
    with pytest.raises(UsageError, match="c.mp4 cannot be decoded"):
        look_at(tmp_path)


def test_times_that_go_back_are_told(tmp_path):
    write_ramp(tmp_path / "a.avi", 40, 8, bf="3", b_strategy="0")
    with pytest.raises(UsageError, match="timestamps that go backwards"):
        read_clip(tmp_path / "a.avi", ClipSpec(64, 48, 17, 8))


@pytest.mark.parametrize("name", ["a.mp4", "a.mpg"])
def test_interlaced_videos_are_made_whole(tmp_path, name):
    """A bar that moves by 4 pixels a field: in a combed frame every second row has it elsewhere."""
    codec = ("libx264", "-x264opts", "tff=1") if name == "a.mp4" else ("mpeg2video",)
    bar = "color=black:s=128x96:r=50:d=2,geq=lum='255*between(X,8+N,23+N)':cb=128:cr=128"
    ffmpeg("-f", "lavfi", "-i", bar, "-vf", "tinterlace=interleave_top,setfield=tff", "-c:v", *codec, "-q:v", 2,
           "-flags", "+ilme+ildct", tmp_path / name)  # fmt: skip
    (tmp_path / "a.txt").write_text("a bar")
    videos, faults = find_videos(tmp_path)
    (cut,) = plan_clips(videos, ClipSpec(128, 96, 17, 16), 16, faults)
    assert cut.interlaced

    def combing(clip):
        rows = clip[:, 8:-8].mean(-1).astype(float)
        return np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean()

    clip = read_clip(tmp_path / name, cut)
    ffmpeg("-i", tmp_path / name, "-c:v", "libx264", "-flags", "-ildct", tmp_path / "combed.mkv")
    combed = read_clip(tmp_path / "combed.mkv", cut)
    assert clip.shape == combed.shape and combing(clip) < 0.25 * combing(combed)
    assert np.abs(clip.mean((1, 2, 3)) - combed.mean((1, 2, 3))).max() < 2  # the same moments


def test_cropped_around_the_middle(tmp_path):
    """A wide picture with a white middle: what is left and right of it goes."""
    picture = np.zeros((48, 128, 3), np.uint8)
    picture[:, 40:88] = 255
    write_still(tmp_path / "a.mp4", picture, 9)
    clip = read_clip(tmp_path / "a.mp4", ClipSpec(48, 48, 5, 8))
    assert clip[:, :, 4:-4].mean() > 240


def test_all_kinds_of_lists_mean_the_same(tmp_path):
    for name in ("one", "two"):
        write_video(tmp_path / f"{name}.mp4", [0, 255], [0, 2000])
    expected = {("one.mp4", "a red circle"), ("two.mp4", 'a "blue", square')}
    lists = {
        "musubi": ("data.jsonl", "\n".join(json.dumps({"video_path": v, "caption": c}) for v, c in expected)),
        "fastvideo": ("videos2caption.json", json.dumps([{"path": v, "cap": [c]} for v, c in expected])),
        "diffsynth-json": ("metadata.json", json.dumps([{"video": v, "prompt": c, "n": 1} for v, c in expected])),
        "diffsynth-jsonl": ("x.jsonl", "\n".join(json.dumps({"video": v, "prompt": c}) for v, c in expected)),
        "hugging-face": ("metadata.csv", 'file_name,text\none.mp4,a red circle\ntwo.mp4,"a ""blue"", square"\n'),
        "hugging-face-tabs": ("metadata.tsv", 'n\tcaption\tfile_name\n1\ta red circle\tone.mp4\n'
                                              '2\t"a ""blue"", square"\ttwo.mp4\n'),
        "hugging-face-jsonl": ("metadata.jsonl", "\n".join(json.dumps({"file_name": v, "prompt": c, "text": ""})
                                                           for v, c in expected)),
        "diffsynth": ("metadata.csv", '\ufeffvideo,prompt\none.mp4,a red circle\ntwo.mp4,"a ""blue"", square"\n'),
    }  # fmt: skip
    for kind, (name, text) in lists.items():
        folder = tmp_path / kind
        (folder / "videos").mkdir(parents=True)
        for video in ("one.mp4", "two.mp4"):
            place = folder / "videos" if kind == "fastvideo" else folder
            (place / video).write_bytes((tmp_path / video).read_bytes())
        (folder / name).write_text(text, encoding="utf-8")
        for given in (folder, folder / name):
            assert {(item.path.name, item.caption) for item in find_videos(given)[0]} == expected, kind
    folder = tmp_path / "plain" / "deeper"
    folder.mkdir(parents=True)
    for video, caption in expected:
        (folder / video).write_bytes((tmp_path / video).read_bytes())
        (folder / video).with_suffix(".txt").write_text(caption + "\n")
    assert {(item.path.name, item.caption) for item in find_videos(tmp_path / "plain")[0]} == expected


def test_videos_are_found_wherever_they_are(tmp_path, monkeypatch):
    """Through links, each folder once; in less usual containers; and, in a list, from the folder one is in."""
    aside, raw = tmp_path / "aside", tmp_path / "raw"
    for folder in (aside, raw / "deep"):
        folder.mkdir(parents=True)
    write_ramp(aside / "a.ts")
    ffmpeg("-i", aside / "a.ts", aside / "b.wmv")
    for name in "ab":
        (aside / f"{name}.txt").write_text(name)
    (raw / "deep" / "linked").symlink_to(aside)
    (aside / "round").symlink_to(raw)
    assert [(item.caption, cut.num_frames) for item, cut in zip(find_videos(raw)[0], look_at(raw), strict=True)] == [
        ("a", 17), ("b", 17)
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (raw / "musubi.jsonl").write_text(json.dumps({"video_path": "aside/a.ts", "caption": "a"}))
    (cut,) = look_at(raw)
    assert cut.num_frames == 17


def test_what_cannot_be_decoded_at_the_beginning_does_not_count(tmp_path):
    """A recording that starts between key frames is as long as what is shown of it."""
    write_ramp(tmp_path / "whole.ts", frames=48, g="20", keyint_min="20", sc_threshold="0", bf="0")
    with av.open(str(tmp_path / "whole.ts")) as container:
        stream = container.streams.video[0]
        places = [packet.pos for packet in container.demux(stream) if packet.pts is not None]
    data = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[places[4] :])
    (cut,) = plan_clips([SourceVideo(tmp_path / "cut.ts", "a", "a")], ClipSpec(64, 48, 33, 16), 16)
    assert cut.num_frames < 33 and read_clip(tmp_path / "cut.ts", cut).shape[0] == cut.num_frames


def test_every_fault_is_told_at_once(tmp_path):
    write_video(tmp_path / "good.mp4", [0, 255], [0, 2000])
    write_video(tmp_path / "short.mp4", [0, 255], [0, 100])
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    lines = [{"video_path": f"{name}.mp4", "caption": "a"} for name in ("good", "short", "sound", "broken", "empty")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError) as caught:
        look_at(tmp_path)
    text = str(caught.value)
    assert text.startswith("the data set has 4 faults")
    for part in ("data.jsonl:2: short.mp4 is 0.10 s long", "data.jsonl:3: sound.mp4 has audio but no video",
                 "data.jsonl:4: broken.mp4 cannot be decoded", "data.jsonl:5: empty.mp4 cannot be dec"):  # fmt: skip
        assert part in text
    lines = [{"caption": "a"}, {"video_path": "good.mp4"}, {"video_path": "good.mp4", "caption": " "}, 7,
             {"video_path": "gone.mp4", "caption": "a"}, {"video_path": "x" * 300, "caption": "a"},
             {"video_path": "good.mp4", "caption": "a \ud83d"}, {"video_path": "good.mp4", "caption": "a\0"},
             {"video_path": "short.mp4", "caption": "a"}]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(["{", *map(json.dumps, lines)]))
    with pytest.raises(UsageError, match="has 10 faults") as caught:
        look_at(tmp_path)
    for part in ("data.jsonl:1: it is not valid JSON", "data.jsonl:4: the entry needs a caption",
                 "data.jsonl:6: gone.mp4 does not exist", "data.jsonl:7: xxx",
                 "data.jsonl:8: the entry needs a caption", "data.jsonl:10: short.mp4 is 0.10"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "{", "a.jsonl:1: it is not valid JSON"), ("a.jsonl", "", "lists no videos"),
        ("metadata.csv", "video,prompt\na.mp4,a red circle, moving\n", ":2: the line has too many columns; put the"),
        ("metadata.csv", 'video,prompt\na.mp4,"a', ":2: the line is not valid CSV"),
        ("metadata.csv", 'video,prompt\na.mp4,x\nb.mp4,"x" y\nc.mp4,z', "3 faults(.|\n)*:3: the line(.|\n)*:4: c.mp4"),
        ("metadata.csv", "a,b\n1,2\n", "lacks a column"), ("videos2caption.json", "{}", "does not contain a list"),
        ("a.txt", "x", "is not a list of videos"), ("a.csv", b"\xff\xfe", "byte 0xff is not UTF-8. Give UTF-8 text"),
    ],
)  # fmt: skip
def test_lists_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        look_at(tmp_path / name)


WANTED = (
    "Expected: video_path with caption (as in musubi); path with cap (as in FastVideo); video with prompt (as in "
    "DiffSynth); file_name with text or caption or prompt (as in Hugging Face). Rename the "
)


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("metadata.json", '[{"file_path": "a.mp4", "text": "a", "type": "video"}]', "'file_path', 'text', 'type'"),
        ("a.jsonl", '{"file_path": "a.mp4"}\n{"text": "a"}\n7', "'file_path', 'text'"),
        ("metadata.csv", "video;caption\na.mp4;a", "'video', 'caption'"),
        ("metadata.csv", "filename,prompt\na.mp4,a", "'filename', 'prompt'"),
        ("metadata.csv", "a.mp4,a red circle\n", "'a.mp4', 'a-red-circle'"),
        ("metadata.csv", "\n", "none"),
        ("metadata.json", json.dumps([{f"k{i}": 1 for i in range(50)}]), "'k5', 'k6', 'k7', ..."),
    ],
)
def test_other_keys_are_told_once_with_those_wanted(tmp_path, name, text, found):
    """VideoX-Fun's, a mixture of two, a spelling of one's own, no names at all: before any video is read."""
    (tmp_path / name).write_text(text)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UsageError) as caught:
            look_at(path)
        assert f"{found}. {WANTED}" in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_lists_of_other_kinds_are_named(tmp_path):
    """FastVideo's videos.txt with a prompt.txt, and parquet; in a folder they were overlooked, and captions missing."""
    for names, words in ((("videos.txt", "prompt.txt"), "videos.txt is a list.* columns video and prompt"),
                         (("metadata.parquet",), "metadata.parquet is a list.*read_parquet")):  # fmt: skip
        folder = tmp_path / words[:6]
        (folder / "videos").mkdir(parents=True)
        (folder / "videos" / "a.mp4").write_bytes(b"")
        for name in names:
            (folder / name).write_text("a.mp4")
        for path in (folder, folder / names[0]):
            with pytest.raises(UsageError, match=words):
                look_at(path)
    (tmp_path / "own").mkdir()
    for name in ("videos.mp4", "videos.txt"):  # a video of that name, and its caption
        (tmp_path / "own" / name).write_text("a")
    assert [item.caption for item in find_videos(tmp_path / "own")[0]] == ["a"]


def test_the_split_of_a_hugging_face_folder(tmp_path):
    """Its metadata lie a folder down, beside the videos. Captions there come first; two lists are one too many."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.mp4").write_bytes(b"")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\na.mp4,{split}\n")
    with pytest.raises(UsageError, match=r"such as test/metadata.csv and train/metadata.csv. Give the folder of one"):
        find_videos(tmp_path)
    (tmp_path / "test" / "metadata.csv").unlink()
    assert [item.caption for item in find_videos(tmp_path)[0]] == ["train"]
    (tmp_path / "test" / "a.txt").write_text("beside")
    found, faults = find_videos(tmp_path)
    assert [item.caption for item in found] == ["beside"] and len(faults) == 1


def test_folders_without_a_set(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_videos(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="contains no videos"):
        find_videos(tmp_path)
    write_video(tmp_path / "a.mp4", [0], [0])
    write_video(tmp_path / "b.mp4", [0], [0])
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "._b.mp4").write_bytes(b"what a Mac puts beside a file")
    (tmp_path / "c.mp4").symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(UsageError, match="3 faults(.|\n)*c.mp4: the video is a broken link"):
        look_at(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"video_path": "pictures", "caption": "a"}))
    (tmp_path / "._d.jsonl").write_bytes(b"what a Mac puts beside a file")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UsageError, match="d.jsonl:1: pictures is a folder"):
        look_at(tmp_path)
    (tmp_path / "tensors.jsonl").write_text("")
    with pytest.raises(UsageError, match="was interrupted, prepare it again"):
        find_videos(tmp_path)


def test_without_pyav(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", [0, 1], [0, 2000])
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentProblem, match=r"slagen\[finetune\]"):
        look_at(tmp_path)
