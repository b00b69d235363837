"""Frames -> MP4, WebM, GIF or a folder of PNG frames, written whole or not at all; MP4 -> frames."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import imageio_ffmpeg

from slagen.errors import EnvironmentProblem, SlagenError, WeightsError
from slagen.io.files import replace_bytes, scratch, writing
from slagen.io.paths import FRAMES, GIF, VIDEO, WEBM, kind_of
from slagen.io.reading import open_regular

if TYPE_CHECKING:  # so that what a video says of itself is read without it
    import numpy as np

CRF = {VIDEO: 16, WEBM: 18}  # constant rate factor of x264 and of VP9: visually lossless
# Converted to BT.709 at limited range and tagged so, that every player shows the same colours. The tags are set on the
# frames: the encoder's options alone leave primaries and transfer unknown.
COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
# A GIF's 256 colours are chosen from all of its frames.
PALETTE = "split[frames][all];[all]palettegen[colours];[frames][colours]paletteuse"
ENCODERS = {VIDEO: "libx264", WEBM: "libvpx-vp9", GIF: "gif", FRAMES: "png"}
NAMES = {VIDEO: "an H.264 video", WEBM: "a VP9 video", GIF: "a GIF", FRAMES: "PNG files"}


@cache
def check_ffmpeg(kind: str = VIDEO) -> None:
    """Encode one black frame and discard it, so that a fault of ffmpeg is reported before a video is generated.

    Once in a process for each kind of video. Raises EnvironmentProblem where ffmpeg is missing, does not run, or lacks
    the encoder.
    """
    given = os.environ.get("IMAGEIO_FFMPEG_EXE")
    mend = "Try pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to the path of an ffmpeg."
    if given:
        own = f"an ffmpeg with {ENCODERS[kind]}"
        mend = f"IMAGEIO_FFMPEG_EXE is set to {given!r}. Unset it, or set it to the path of {own}."
    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
        command = [exe, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "16x16", "-r", "1", "-i", "-"]
        encoder = ["-c:v", ENCODERS[kind], "-f", "nut"]
        if kind == VIDEO:
            encoder = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "mp4", "-movflags", "+empty_moov"]
        command += [*encoder, "-"]
        done = subprocess.run(command, input=bytes(768), capture_output=True, timeout=60, check=False)
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        found = f"ffmpeg, which writes the videos, cannot be run ({_last_line(error)})"
        raise EnvironmentProblem(f"{found}. {mend}") from error
    if done.returncode != 0 or (b"moov" if kind == VIDEO else b"nut/multimedia container") not in done.stdout:
        words = done.stderr.decode("utf-8", "replace").strip() or f"it exited with code {done.returncode}"
        raise EnvironmentProblem(f"ffmpeg cannot write {NAMES[kind]} ({_last_line(words)}). {mend}")


def _last_line(words: object) -> str:
    return (str(words).strip().splitlines() or [type(words).__name__])[-1][:200]


def write_video(frames: np.ndarray, path: Path, fps: int, comment: str = "") -> None:
    """Write a video as `encode_video` does, whole or not at all; a file there is replaced. Raises SlagenError."""
    try:
        with writing(path) as part:
            encode_video(frames, part, fps, comment)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: BaseException) -> SlagenError:
    """What is said where a video could not be written."""
    lines = [line for line in str(error).splitlines() if line.strip() and line != "Conversion failed!"]
    reason = (lines or ["ffmpeg stopped"])[-1]
    mend = "Try again"
    if any(words in str(error) for words in ("No space left", "Disk quota")):
        mend = f"Free some space on the disk of {path.parent}"
    elif "File too large" in str(error):
        mend = f"Check the file size limit of the shell (ulimit -f) or of the file system of {path.parent}"
    return SlagenError(f"{path} could not be written ({reason}). {mend}, or choose another --output.")


def encode_video(frames: np.ndarray, path: Path, fps: int, comment: str = "", crf: int | None = None) -> None:
    """Make a video of the kind that its name says, and decode it as a check.

    An MP4 is H.264, a WebM is VP9, both yuv420p and tagged BT.709; a GIF has one palette for all frames and plays in a
    loop; a name that ends in .frames is a folder of PNG files, 0001.png and so on.

    Args:
        frames: (F, H, W, 3) uint8 RGB, H and W even.
        path: a file or folder that is not there yet.
        fps: frames a second.
        comment: kept in the metadata of an MP4 or WebM; the others hold none.
        crf: constant rate factor of an MP4 or WebM, lower is better; None is `CRF`.
    Raises: OSError if the video cannot be written or does not read back.
    """
    with VideoWriter(path, frames.shape[1:3], fps, comment, crf) as writer:
        writer.write(frames)
        writer.finish(len(frames))


class VideoWriter:
    """A video that ffmpeg encodes while its frames come; what is not finished when the block ends is stopped.

    Args:
        path, fps, comment, crf: as in `encode_video`. size: height and width of the frames.
    Raises: OSError.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int, comment: str = "", crf: int | None = None) -> None:
        self.path, self.size, self.kind = path, size, kind_of(path)
        if self.kind == FRAMES:
            path.mkdir()
        command: list[str | bytes] = [
            "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", str(fps), "-i", "-",
            *_options(self.kind, comment, CRF.get(self.kind) if crf is None else crf),
            "%04d.png" if self.kind == FRAMES else _name(path),
        ]  # fmt: skip
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the writer
        try:
            self._process = subprocess.Popen(  # out of reach of Ctrl-C
                [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *command],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,
                cwd=path if self.kind == FRAMES else None,
            )  # fmt: skip
        except BaseException:
            self._errors.close()
            raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what was not written yet
            self._process.stdin.close()  # type: ignore[union-attr]
        self._errors.close()

    def write(self, frames: np.ndarray) -> None:
        """Hand on some frames, (f, H, W, 3) uint8 RGB."""
        import numpy as np

        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `finish` says why
            for frame in frames:
                self._process.stdin.write(np.ascontiguousarray(frame).data)

    def finish(self, num_frames: int, replacing: tuple[str, str] | None = None) -> None:
        """Wait for the video, and decode it as a check.

        Args:
            num_frames: that were handed on.
            replacing: a text in its comment, and another one of the same length in its place.
        Raises: OSError with ffmpeg's own last words.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait()
        _check_limit(status)
        if status:
            self._errors.seek(0)
            raise OSError(self._errors.read().decode("utf-8", "replace").strip() or f"ffmpeg exited with code {status}")
        if replacing is not None and self.kind in (VIDEO, WEBM):
            replace_bytes(self.path, *(text.encode() for text in replacing))
        try:
            read = _first_frame(self.path / "0001.png" if self.kind == FRAMES else self.path)
        except (RuntimeError, StopIteration) as error:
            raise OSError(str(error).strip() or "the written video cannot be decoded") from error
        if read.shape[:2] != tuple(self.size):
            raise OSError(f"the written video has the wrong size, {read.shape[1]}x{read.shape[0]} pixels")
        if self.kind == FRAMES and len(os.listdir(self.path)) != num_frames:
            raise OSError(f"{len(os.listdir(self.path))} of {num_frames} frames were written")


def _options(kind: str, comment: str, crf: int | None) -> list[str | bytes]:
    """What ffmpeg is told of a video of a kind."""
    tag = f"comment={comment}"
    about: list[str | bytes] = ["-metadata", tag if os.name == "nt" else tag.encode()] if comment else []  # UTF-8
    encoder = ["-c:v", ENCODERS[kind]]
    lossy = ["-vf", COLOUR, *encoder, "-pix_fmt", "yuv420p", "-crf", str(crf)]
    if kind == VIDEO:
        return [*lossy, "-preset", "medium", *about, "-movflags", "+faststart", "-f", "mp4"]
    if kind == WEBM:  # without a bound on the bit rate the crf alone counts
        return [*lossy, "-b:v", "0", "-row-mt", "1", "-cpu-used", "2", *about, "-f", "webm"]
    if kind == GIF:
        return ["-filter_complex", PALETTE, *encoder, "-loop", "0", "-f", "gif"]
    return [*encoder, "-f", "image2"]


def _name(path: str | Path) -> str:
    """A path as ffmpeg takes it: absolute, for `take:1.mp4` would be a protocol and `-x.mp4` an option."""
    return os.path.abspath(path)


def _check_limit(status: int) -> None:
    """Raise OSError where the limit on a file's size has ended ffmpeg, which leaves it no last words."""
    too_large = getattr(signal, "SIGXFSZ", None)
    if too_large is not None and status == -too_large:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def read_mp4(path: str | Path) -> np.ndarray:
    """All frames of a video, (F, H, W, 3) uint8 RGB. Raises SlagenError if it cannot be decoded."""
    import numpy as np

    try:
        reader = imageio_ffmpeg.read_frames(_name(path))
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, StopIteration) as error:
        check_ffmpeg()
        raise SlagenError(f"{path} is not a video that ffmpeg can decode. Check the file.") from error
    return np.stack(frames)


def make_thumbnail(path: Path, width: int = 240) -> bytes:
    """A small MP4 of a video, no wider than `width` pixels. Raises SlagenError if ffmpeg cannot make it."""
    with scratch() as folder:
        small = folder / "small.mp4"
        scale = f"scale='min({width},iw)':-2"
        _run(path, ["-vf", scale, "-an", "-crf", "28", "-pix_fmt", "yuv420p", "-map_metadata", "-1", "-movflags",
                    "+faststart", _name(small)])  # fmt: skip
        return small.read_bytes()


def is_mp4(path: Path) -> bool:
    """Whether a file begins as an MP4 does."""
    try:
        with open_regular(path) as handle:
            return handle.read(12)[4:8] == b"ftyp"
    except OSError:
        return False


def is_matroska(path: Path) -> bool:
    """Whether a file begins as a WebM does."""
    return other_kind(path) == MATROSKA


MATROSKA = "a Matroska or WebM video"
OTHER_KINDS = (  # how files of moving pictures begin that are no MP4: an offset, bytes, a name
    (0, b"\x1a\x45\xdf\xa3", MATROSKA), (8, b"AVI ", "an AVI video"), (8, b"WEBP", "a WebP picture"),
    (0, b"GIF8", "a GIF"), (0, b"\x89PNG", "a PNG picture"), (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"FLV\x01", "a Flash video"), (0, b"OggS", "an Ogg video"), (0, b"\x30\x26\xb2\x75", "a Windows Media video"),
    (0, b"\x00\x00\x01\xba", "an MPEG video"), (0, b"\x00\x00\x01\xb3", "an MPEG video"),
    (0, b"YUV4MPEG2", "a raw video"), (4, b"moov", "a QuickTime video"), (4, b"mdat", "a QuickTime video"),
    (4, b"wide", "a QuickTime video"),
)  # fmt: skip


def other_kind(path: Path) -> str | None:
    """What a file is that holds pictures but is no MP4; None for all else."""
    try:
        with open_regular(path) as handle:
            start = handle.read(377)
    except OSError:
        return None
    if start[:1] == b"G" and start[188:189] == start[376:377] == b"G":
        return "an MPEG transport stream"
    return next((name for offset, magic, name in OTHER_KINDS if start[offset:].startswith(magic)), None)


def read_comment(path: Path) -> str:
    """The comment in a video's metadata, empty without one. Raises WeightsError if ffmpeg cannot read the file."""
    text = _run(path, ["-f", "ffmetadata", "-"]).decode("utf-8", "replace")
    if not text.startswith(";FFMETADATA"):
        check_ffmpeg()
    match = re.search(r"^comment=((?:[^\\\n]|\\.)*)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL) if match else ""


def _run(path: Path, options: list[str]) -> bytes:
    """What ffmpeg makes of a video. Raises WeightsError if it cannot, EnvironmentProblem if that is ffmpeg's fault."""
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", _name(path), *options]
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise WeightsError(f"{path} could not be read by ffmpeg within five minutes. Check the file.") from None
    except (OSError, RuntimeError):
        check_ffmpeg()
        raise
    _check_limit(done.returncode)
    if done.returncode != 0:
        check_ffmpeg()
        raise WeightsError(f"{path} is not a video that ffmpeg can read. Check the file.")
    return done.stdout


def _first_frame(path: Path) -> np.ndarray:
    import numpy as np

    reader = imageio_ffmpeg.read_frames(_name(path))
    try:
        width, height = next(reader)["size"]
        return np.frombuffer(next(reader), np.uint8).reshape(height, width, 3)
    finally:
        reader.close()
