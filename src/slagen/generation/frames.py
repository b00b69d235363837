"""The frames of a video as they are decoded: counted, hashed, kept, and encoded while the next ones come."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slagen.events import Event
from slagen.io.stages import Stage, staging
from slagen.video import VideoWriter, encode_video
from slagen.wan.vae import num_parts, stream_latents


class Frames:
    """Frames, in order.

    Args: keep: all of them, in memory.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.count, self.size = 0, (0, 0)  # height and width
        self.colour: np.ndarray | None = None  # of the first pixel
        self.is_plain = True  # all pixels have that colour
        self._digest = hashlib.sha256()
        self._parts: list[np.ndarray] = []

    def take(self, frames: torch.Tensor) -> None:
        """Take the next ones, (f, H, W, 3) uint8 on the CPU."""
        part = np.ascontiguousarray(frames.numpy())
        self.count, self.size = self.count + len(part), part.shape[1:3]
        self.colour = part[0, 0, 0] if self.colour is None else self.colour
        self.is_plain = self.is_plain and bool((part == self.colour).all())
        self._digest.update(part.data)
        if self.keep:
            self._parts.append(part)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3)"""
        return self.count, *self.size, 3

    @property
    def sha256(self) -> str:
        """Of all bytes."""
        return self._digest.hexdigest()

    def whole(self) -> np.ndarray:
        """All of them, (F, H, W, 3) uint8, where they are kept."""
        self._parts = [np.concatenate(self._parts)] if len(self._parts) != 1 else self._parts
        return self._parts[0]

    def warn_of_one_colour(self, seed: int, on_event: Callable[[Event], None]) -> None:
        """Warn if all pixels have one colour."""
        if self.is_plain and self.colour is not None:
            colour = ", ".join(map(str, self.colour))
            on_event(Event("warning", f"every pixel of the video with seed {seed} has the same colour, RGB {colour}"))

    @contextlib.contextmanager
    def staged(self, path: Path, fps: int, comment: Callable[[str], str], crf: int | None) -> Iterator[Stage]:
        """A stage beside a path, which holds the video of that name already.

        Args: comment: of the hash of the frames, what the file says of itself.
        Raises: OSError.
        """
        with staging(path.parent) as stage:
            encode_video(self.whole(), stage.folder / path.name, fps, comment(self.sha256), crf)
            yield stage


class EncodedFrames(Frames):
    """Frames that are encoded as they come, into a stage beside the video's final path. As a context manager, so that
    nothing is left of a video that is not published.

    What its file says of itself holds the hash of all frames, which is known in the end only: until then a random text
    of the same length stands there.

    Args:
        path, fps, crf: of the video. comment: as in `staged`; to be set before the first frame.
        keep: as in `Frames`.
    """

    def __init__(self, path: Path, fps: int, crf: int | None, keep: bool) -> None:
        super().__init__(keep)
        self.path, self.fps, self.crf = path, fps, crf
        self.comment: Callable[[str], str] = lambda frames_hash: ""
        self._hash_to_come = secrets.token_hex(32)
        self._said = ""
        self._held = contextlib.ExitStack()
        self._error: OSError | None = None
        self._stage: Stage | None = None
        self._writer: VideoWriter | None = None

    def __enter__(self) -> EncodedFrames:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def take(self, frames: torch.Tensor) -> None:
        first = not self.count
        super().take(frames)
        try:
            if first:
                self._open()
            if self._writer is not None:
                self._writer.write(frames.numpy())
        except OSError as error:  # told in the end, when the latents can be kept
            self._error, self._writer = error, None

    def _open(self) -> None:
        self._stage = self._held.enter_context(staging(self.path.parent))
        self._said = self.comment(self._hash_to_come)
        writer = VideoWriter(self._stage.folder / self.path.name, self.size, self.fps, self._said, self.crf)
        self._writer = self._held.enter_context(writer)

    @contextlib.contextmanager
    def staged(self, path: Path, fps: int, comment: Callable[[str], str], crf: int | None) -> Iterator[Stage]:
        with self._held:
            if self._error is not None:
                raise self._error
            assert self._stage is not None and self._writer is not None
            self._writer.finish(self.count, (self._hash_to_come, self.sha256) if self._said else None)
            yield self._stage


def decode_into(frames: Frames, vae: Any, latents: torch.Tensor, on_event: Callable[[Event], None]) -> None:
    """The stage "decode": the frames of latents (1, C, T, h, w). Raises as `stream_latents`."""
    total = num_parts(vae, latents)
    on_event(Event("stage", "decode", num_steps=total))
    stream_latents(vae, latents, frames.take, lambda done: on_event(Event("part", num_steps=total, done=done)))


def decode_frames(vae: Any, latents: torch.Tensor, on_event: Callable[[Event], None]) -> np.ndarray:
    """All of them, (F, H, W, 3) uint8."""
    frames = Frames()
    decode_into(frames, vae, latents, on_event)
    return frames.whole()
