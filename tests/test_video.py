"""MP4 files: written whole and readable, or not at all."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version, read_frames
from PIL import Image

from slagen.errors import SlagenError
from slagen.video import make_thumbnail, read_comment, read_mp4, write_video

COLOURS = np.array(
    [(225, 30, 35), (30, 170, 60), (35, 85, 230), (250, 220, 40), (12, 12, 14), (245, 245, 245)], np.uint8
)


def clip(num_frames=9, height=48, width=64):
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = COLOURS.repeat(11, axis=0)[:width]
    return frames


def test_colours_and_frames_survive(tmp_path):
    write_video(clip(), tmp_path / "a.mp4", fps=8)
    read = read_mp4(tmp_path / "a.mp4")
    assert read.shape == (9, 48, 64, 3)
    inside = np.arange(5, 64, 11)
    assert np.abs(read[:, 24, inside].astype(int) - COLOURS).max() <= 6
    metadata = next(read_frames(str(tmp_path / "a.mp4")))
    assert metadata["fps"] == 8 and metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")
    assert get_ffmpeg_version()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_every_colour_tag_is_bt709_and_true(tmp_path):
    """ffmpeg shows the three tags as one where they agree; primaries and transfer were once unknown."""
    pure = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8)
    frames = np.broadcast_to(pure.repeat(16, axis=0), (3, 48, 64, 3))
    write_video(frames, tmp_path / "a.mp4", fps=8)
    told = subprocess.run([get_ffmpeg_exe(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709, progressive)" in told
    assert np.abs(read_mp4(tmp_path / "a.mp4")[:, 24, 8::16].astype(int) - pure).max() <= 3
    assert b"colrnclx\0\1\0\1\0\1" in (tmp_path / "a.mp4").read_bytes()


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "a.frames"])
def test_other_kinds_open_in_other_programs(tmp_path, name):
    """Whole and in the right colours, as ffmpeg and Pillow read them."""
    path = tmp_path / name
    write_video(clip(5, 32, 64), path, fps=8, comment="é [x]")
    files = sorted(path.iterdir()) if name == "a.frames" else []
    read = np.stack([np.asarray(Image.open(file)) for file in files]) if files else read_mp4(path)
    inside = np.arange(5, 64, 11)
    assert read.shape == (5, 32, 64, 3)
    assert np.abs(read[:, 16, inside].astype(int) - COLOURS).max() <= (6 if name == "a.webm" else 0)
    if name == "a.gif":
        with Image.open(path) as picture:
            assert (picture.n_frames, picture.info["loop"]) == (5, 0)
    if name == "a.webm":
        metadata = next(read_frames(str(path)))
        assert (metadata["codec"], metadata["fps"], read_comment(path)) == ("vp9", 8, "é [x]")
    assert [p.name for p in tmp_path.iterdir()] == [name]


NAMES = ("take:1.mp4", "-x.mp4", "http://x%03d.mp4", "[red] 'caf\udce9'\n\x1b[31m 狐.MP4")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_ffmpeg_would_read_as_something_else(tmp_path, monkeypatch, name):
    """Relative, so that nothing in front of them protects them."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(clip(3), path, fps=8, comment="é [x]")
    assert read_mp4(path).shape == read_mp4(str(path)).shape == (3, 48, 64, 3)
    assert read_comment(path) == "é [x]" and make_thumbnail(path)[4:8] == b"ftyp"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_gone_leaves_nothing(tmp_path):
    with pytest.raises(SlagenError, match="could not be written.*No such file"):
        write_video(clip(), tmp_path / "none" / "a.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    write_video(clip(), tmp_path / "a.mp4", fps=8)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr("slagen.video._first_frame", lambda path: np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(SlagenError, match="the written video has the wrong size, 2x2 pixels"):
        write_video(clip(), tmp_path / "a.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(SlagenError, match="not a video"):
        read_mp4(tmp_path / "a.mp4")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of a file")
def test_a_limit_on_the_size_of_a_file_is_told_as_such(tmp_path, monkeypatch):
    """ffmpeg dies of a signal then, without last words: "ffmpeg exited with code -25. Try again"."""
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\nulimit -c 0\ncat > /dev/null\nkill -{int(signal.SIGXFSZ)} $$\n")
    script.chmod(0o755)
    monkeypatch.setattr("slagen.video.imageio_ffmpeg.get_ffmpeg_exe", lambda: str(script))
    (tmp_path / "out").mkdir()
    with pytest.raises(SlagenError, match=r"File too large\). Check the file size limit.*ulimit -f"):
        write_video(np.zeros((2, 16, 16, 3), np.uint8), tmp_path / "out" / "x.mp4", 8)
    assert not list((tmp_path / "out").iterdir())
