"""MP4 files: written whole and readable, or not at all."""

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_version, read_frames

from slagen.errors import SlagenError
from slagen.video import read_mp4, write_mp4

COLOURS = np.array(
    [(225, 30, 35), (30, 170, 60), (35, 85, 230), (250, 220, 40), (12, 12, 14), (245, 245, 245)], np.uint8
)


def clip(num_frames=9, height=48, width=64):
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = COLOURS.repeat(11, axis=0)[:width]
    return frames


def test_colours_and_frames_survive(tmp_path):
    write_mp4(clip(), tmp_path / "a.mp4", fps=8)
    read = read_mp4(tmp_path / "a.mp4")
    assert read.shape == (9, 48, 64, 3)
    inside = np.arange(5, 64, 11)
    assert np.abs(read[:, 24, inside].astype(int) - COLOURS).max() <= 6
    metadata = next(read_frames(str(tmp_path / "a.mp4")))
    assert metadata["fps"] == 8 and metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")
    assert get_ffmpeg_version()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_folder_that_is_gone_leaves_nothing(tmp_path):
    with pytest.raises(SlagenError, match="could not be written"):
        write_mp4(clip(), tmp_path / "none" / "a.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    write_mp4(clip(), tmp_path / "a.mp4", fps=8)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr("slagen.video._first_frame", lambda path: np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(SlagenError, match="reads back as 2x2"):
        write_mp4(clip(), tmp_path / "a.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(SlagenError, match="no video"):
        read_mp4(tmp_path / "a.mp4")
