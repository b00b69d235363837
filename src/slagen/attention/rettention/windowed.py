"""Re-ttention a run of queries at a time: what `reference.py` defines, in memory that grows with L.

With the tokens of one place in all T frames side by side, the window of a query is one stretch of keys. So q, k and v
are put into that order first; a run of R places has R T query rows, whose windows lie in (R + 2 reach) T keys. In a
dense step a run attends to all keys, and its window's share and output come of the same weights.

Both steps are one PyTorch operator each, so that compiled code does not unroll their runs. No gradient passes through.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

RUN_BYTES = 32 * 2**20  # of the scores of a run


def by_place(x: Tensor, frames: int) -> Tensor:
    """(B, H, L, D) in raster order -> (B H, places, T, D) float32, or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).unflatten(2, (frames, -1)).transpose(2, 3).flatten(0, 1)


def by_frame(x: Tensor, like: Tensor) -> Tensor:
    """(B H, places, T, D) -> (B, H, L, D) in raster order."""
    return x.unflatten(0, like.shape[:2]).transpose(2, 3).flatten(2, 3)


def _runs(places: int, most: int) -> Iterator[slice]:
    yield from (slice(first, min(first + most, places)) for first in range(0, places, most))


def _window(run: slice, places: int, reach: int, frames: int, device: torch.device) -> tuple[slice, Tensor]:
    """The places that a run's windows lie in, and which keys are in which query's window, (R T, keys) bool."""
    near = slice(max(0, run.start - reach), min(places, run.stop + reach))
    queries = torch.arange(run.start, run.stop, device=device).repeat_interleave(frames)
    keys = torch.arange(near.start, near.stop, device=device).repeat_interleave(frames)
    return near, (queries[:, None] - keys).abs() <= reach


@torch.library.custom_op("slagen::rettention_dense", mutates_args=())
def dense_step(q: Tensor, k: Tensor, v: Tensor, frames: int, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """o and res, (B, H, L, D) in q's dtype, and rho, (B, H, L, 1) float32 or float64, of q, k, v (B, H, L, D)."""
    q_p, k_p, v_p = by_place(q, frames) * q.shape[3] ** -0.5, by_place(k, frames), by_place(v, frames)
    places, (keys, values) = q_p.shape[1], (x.flatten(1, 2) for x in (k_p, v_p))
    o, rest, ratio = torch.empty_like(q_p), torch.empty_like(q_p), torch.empty_like(q_p[..., :1])
    row_bytes = q_p.element_size() * q_p.shape[0] * frames * keys.shape[1]
    for run in _runs(places, max(1, RUN_BYTES // row_bytes)):
        p = (q_p[:, run].flatten(1, 2) @ keys.mT).softmax(-1)
        near, inside = _window(run, places, reach, frames, q.device)
        shape = o[:, run].shape
        o[:, run] = (p @ values).view(shape)
        w = p[..., near.start * frames : near.stop * frames] * inside
        ratio[:, run] = w.sum(-1).view(*shape[:3], 1)
        rest[:, run] = o[:, run] - (w @ v_p[:, near].flatten(1, 2)).view(shape)
    o, rest, ratio = (by_frame(x, q) for x in (o, rest, ratio))
    return o.to(q.dtype), rest.to(q.dtype), ratio


@dense_step.register_fake
def _(q, k, v, frames, reach):
    ratio = q.new_empty(*q.shape[:3], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), q.new_empty(q.shape), ratio


@torch.library.custom_op("slagen::rettention_window", mutates_args=())
def window_step(q: Tensor, k: Tensor, v: Tensor, frames: int, reach: int) -> Tensor:
    """O^W, (B, H, L, D) float32 or float64: the softmax over the window alone."""
    q_p, k_p, v_p = by_place(q, frames) * q.shape[3] ** -0.5, by_place(k, frames), by_place(v, frames)
    o, places = torch.empty_like(q_p), q_p.shape[1]
    for run in _runs(places, max(1, reach)):
        near, inside = _window(run, places, reach, frames, q.device)
        s = q_p[:, run].flatten(1, 2) @ k_p[:, near].flatten(1, 2).mT
        p = s.masked_fill_(~inside, -torch.inf).softmax(-1)
        o[:, run] = (p @ v_p[:, near].flatten(1, 2)).view(o[:, run].shape)
    return by_frame(o, q)


@window_step.register_fake
def _(q, k, v, frames, reach):
    return q.new_empty(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
