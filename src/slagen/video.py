"""Frames -> MP4, written whole or not at all; MP4 -> frames."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from slagen.errors import SlagenError, WeightsError
from slagen.files import scratch, writing

CRF = 16  # x264 constant rate factor: visually lossless
# Converted to BT.709 at limited range and tagged so, that every player shows the same colours. The tags are set on the
# frames: the encoder's options alone leave primaries and transfer unknown.
COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)


def write_mp4(frames: np.ndarray, path: Path, fps: int, comment: str = "") -> None:
    """Write a video as `encode_mp4` does, whole or not at all; a file there is replaced. Raises SlagenError."""
    try:
        with writing(path) as part:
            encode_mp4(frames, part, fps, comment)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: BaseException) -> SlagenError:
    """What is said where a video could not be written."""
    lines = [line for line in str(error).splitlines() if line.strip() and line != "Conversion failed!"]
    reason = (lines or ["ffmpeg stopped"])[-1]
    return SlagenError(
        f"{path} could not be written ({reason}). Check the free space of {path.parent}, or give another --output."
    )


def encode_mp4(frames: np.ndarray, path: Path, fps: int, comment: str = "") -> None:
    """Make an H.264 MP4 (yuv420p, plays everywhere), and decode it as a check.

    Args:
        frames: (F, H, W, 3) uint8 RGB, H and W even.
        path: a file that is not there yet.
        fps: frames a second.
        comment: kept in the file's metadata.
    Raises: OSError if the file cannot be written or does not read back.
    """
    num_frames, height, width, _ = frames.shape
    command = [
        "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
        "-vf", COLOUR, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-preset", "medium",
        *(["-metadata", f"comment={comment}"] if comment else []),
        "-movflags", "+faststart", "-f", "mp4", _name(path),
    ]  # fmt: skip
    _encode(command, frames)
    try:
        read = _first_frame(path)
    except (RuntimeError, StopIteration) as error:
        raise OSError(str(error).strip() or "it does not read back") from error
    if read.shape != frames.shape[1:]:
        raise OSError(f"it reads back as {read.shape[1]}x{read.shape[0]} pixels")


def _name(path: str | Path) -> str:
    """A path as ffmpeg takes it: absolute, for `take:1.mp4` would be a protocol and `-x.mp4` an option."""
    return os.path.abspath(path)


def _encode(command: list[str], frames: np.ndarray) -> None:
    """Run ffmpeg on raw frames, out of reach of Ctrl-C. Raises OSError with its own last words if it fails."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *command],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
                for frame in frames:
                    process.stdin.write(np.ascontiguousarray(frame).data)
                process.stdin.close()
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            told.seek(0)
            raise OSError(told.read().decode("utf-8", "replace").strip() or f"ffmpeg ended with {status}")


def read_mp4(path: str | Path) -> np.ndarray:
    """All frames of a video, (F, H, W, 3) uint8 RGB. Raises SlagenError if it cannot be decoded."""
    try:
        reader = imageio_ffmpeg.read_frames(_name(path))
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, StopIteration) as error:
        raise SlagenError(f"{path} is no video that ffmpeg can decode. Check the file.") from error
    return np.stack(frames)


def make_thumbnail(path: Path, width: int = 240) -> bytes:
    """A small MP4 of a video, no wider than `width` pixels. Raises SlagenError if ffmpeg cannot make it."""
    with scratch() as folder:
        small = folder / "small.mp4"
        scale = f"scale='min({width},iw)':-2"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", _name(path), "-vf", scale, "-an", "-crf", "28"]
        command += ["-pix_fmt", "yuv420p", "-map_metadata", "-1", "-movflags", "+faststart", _name(small)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            raise SlagenError(f"{path} kept ffmpeg busy for five minutes. Check the file.") from None
        if done.returncode != 0:
            raise SlagenError(f"{path} is no video that ffmpeg can read. Check the file.")
        return small.read_bytes()


def is_mp4(path: Path) -> bool:
    """Whether a file begins as an MP4 does."""
    try:
        with path.open("rb") as handle:
            return handle.read(12)[4:8] == b"ftyp"
    except OSError:
        return False


def read_comment(path: Path) -> str:
    """The comment in a video's metadata, empty without one. Raises WeightsError if ffmpeg cannot read the file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", _name(path), "-f", "ffmetadata", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise WeightsError(f"{path} kept ffmpeg busy for a minute. Check the file.") from None
    if done.returncode != 0:
        raise WeightsError(f"{path} is no video that ffmpeg can read. Check the file.")
    text = done.stdout.decode("utf-8", "replace")
    match = re.search(r"^comment=((?:[^\\\n]|\\.)*)", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL) if match else ""


def _first_frame(path: Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(_name(path))
    try:
        width, height = next(reader)["size"]
        return np.frombuffer(next(reader), np.uint8).reshape(height, width, 3)
    finally:
        reader.close()
