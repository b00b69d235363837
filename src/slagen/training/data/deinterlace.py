"""Deinterlace a video: turn frames of two fields, which were taken at different times, into progressive frames."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

LOOKED_AT = 5  # frames: a video may begin with a still that is no field pair


def is_interlaced(frames: Iterator[Any]) -> bool:
    """Whether one of the next few frames is flagged as two fields."""
    return any(frame.interlaced_frame for frame in islice(frames, LOOKED_AT))


def whole_frames(container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
    """Each frame with its time in seconds, deinterlaced by bwdif from the first that is flagged as two fields.

    Frames without a time are left out; those that are not flagged come out as they are.
    """
    graph: Any = None
    form: tuple[int, int, str] | None = None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        if graph is None and not frame.interlaced_frame:
            yield frame, float(frame.pts * stream.time_base)
            continue
        if (now := (frame.width, frame.height, frame.format.name)) != form:
            yield from _pull(graph)
            graph, form = _bwdif(stream, frame), now
        graph.push(frame)
        yield from _pull(graph, ended=False)
    yield from _pull(graph)


def _bwdif(stream: Any, frame: Any) -> Any:
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
    )  # fmt: skip
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pull(graph: Any, ended: bool = True) -> Iterator[tuple[Any, float]]:
    """What a graph has ready; all that is left in it where its input has ended."""
    import av

    if graph is None:
        return
    if ended:
        graph.push(None)
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield frame, float(frame.pts * frame.time_base)
