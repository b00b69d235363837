"""The sparse branch block by block: softmax attention to the gathered critical key blocks, forward and backward.

The critical key blocks of a few query blocks are copied side by side and attended to with dense matrix products that
stay in the cache. G, R and blocks are as in `blocks.py`.

Rows may keep different numbers of blocks. Their lists then end with the kept blocks, ascending, behind as many others
as make them equally long, and `counts` (G, R) says how many are kept: what stands before those is masked.

The last key block may be partial, by the length. Where others may be too, `filled` (N,) int64 says how many keys of
each are real: those stand first, and the rest is masked.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# The fastest powers of two on a Xeon with 2 MiB of second-level cache per core, for D = 128 and blocks of 64, and for
# D = 64 and blocks of 16; a factor of 4 either way costs 5 to 25 %.
CHUNK_BYTES = 2**20  # per thread: gathered keys, scores and weights of the query blocks attended at a time


def kept_lists(kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """From the kept blocks, (G, R, N) bool, at least one a row, to their lists, (G, R, longest) int64, and counts; None
    for these where all rows keep as many."""
    counts = kept.sum(-1)
    fewest, most = (int(number) for number in counts.aminmax())
    if fewest == most:
        return kept.flatten().nonzero().remainder(kept.shape[-1]).view(*kept.shape[:-1], most), None
    return kept.to(torch.uint8).sort(dim=-1, stable=True).indices[..., kept.shape[-1] - most :], counts


def _critical_chunks(
    q: Tensor, k: Tensor, kv_indices: Tensor, counts: Tensor | None, filled: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Split the G * R query blocks into cache-sized chunks of C.

    Yields their slice, their C * topk critical blocks among the G * N key blocks, and which of them, (C, 1, 1), end
    with the last block of a head. Critical blocks ascend, so no other position can hold that block. With counts, topk
    is the largest of the chunk. With counts or filled, the last that it yields marks the keys to mask,
    (C, 1, topk * block_n) bool.
    """
    num_heads, num_key_blocks, block_n, head_dim = k.shape
    topk = kv_indices.shape[2]
    offsets = torch.arange(0, num_heads * num_key_blocks, num_key_blocks, device=k.device)
    flat = (kv_indices + offsets[:, None, None]).flatten(0, 1)
    ends = (kv_indices[..., -1] == num_key_blocks - 1).view(-1, 1, 1)
    unfilled = None if filled is None else torch.arange(block_n, device=k.device) >= filled[:, None]

    size = k.element_size() * topk * block_n * (head_dim + 2 * q.shape[2])  # gathered keys or values, scores, weights
    chunk = max(1, CHUNK_BYTES // size) * torch.get_num_threads()
    for i in range(0, len(ends), chunk):
        rows, own, hidden = slice(i, i + chunk), flat[i : i + chunk], None
        if counts is not None:
            count = counts.flatten()[rows]
            own = own[:, topk - int(count.max()) :]
            places = torch.arange(own.shape[1], device=k.device).repeat_interleave(block_n)
            hidden = places < (own.shape[1] - count).view(-1, 1, 1)
        if unfilled is not None:
            rest = unfilled.index_select(0, own.flatten() % num_key_blocks).view(len(own), 1, -1)
            hidden = rest if hidden is None else hidden | rest
        yield rows, own.flatten(), ends[rows], hidden


def _critical_scores(
    q: Tensor, k: Tensor, ends: Tensor, padding: int, bias: Tensor | None, hidden: Tensor | None
) -> Tensor:
    """Scores of scaled queries (C, block_m, D) and gathered keys (C, topk * block_n, D), -inf where masked."""
    s = torch.bmm(q, k.mT)
    if bias is not None:
        s += bias[:, None].repeat_interleave(k.shape[1] // bias.shape[1], 2)
    if padding:
        s[..., -padding:].masked_fill_(ends, -torch.inf)
    return s if hidden is None else s.masked_fill_(hidden, -torch.inf)


def sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    length: int,
    out: Tensor,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    filled: Tensor | None = None,
    rounded: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write O^s into `out` (G, R, block_m, D), and the log of each row's denominator into `lse` (G, R, block_m).

    q comes scaled; bias (G, R, topk), which goes without counts, is added to the scores of all keys of a block.
    `rounded` is applied to the weights before they meet the values, (C, block_m, topk, block_n).
    """
    q_flat, k_flat, v_flat, out_flat = (x.flatten(0, 1) for x in (q, k, v, out))
    padding = k.shape[1] * k.shape[2] - length
    for rows, blocks, ends, hidden in _critical_chunks(q, k, kv_indices, counts, filled):
        gathered = (len(ends), -1, k.shape[3])
        bias_c = None if bias is None else bias.flatten(0, 1)[rows]
        k_c = k_flat.index_select(0, blocks).view(gathered)
        s = _critical_scores(q_flat[rows], k_c, ends, padding, bias_c, hidden)
        p = torch.softmax(s, -1)
        if rounded is not None:
            p = rounded(p.unflatten(-1, (-1, k.shape[2]))).flatten(-2)
        torch.bmm(p, v_flat.index_select(0, blocks).view(gathered), out=out_flat[rows])
        if lse is not None:  # the largest weight is exp(its score - lse)
            lse.flatten(0, 1)[rows] = s.amax(-1) - p.amax(-1).log()


def sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    length: int,
    do: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlse: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    counts: Tensor | None = None,
    merged: tuple[Tensor, Tensor] | None = None,
    filled: Tensor | None = None,
) -> Tensor:
    """Add to dk and dv, write dbias, and return dq; q comes scaled, and dq is the gradient of that.

    do (G, R, block_m, D) and dlse (G, R, block_m) are the gradients of O^s and lse; bias and dbias are (G, R, topk).
    Where O^s is `share` of a larger softmax, `merged` takes the place of dlse: that share, and rowsum(dO * O) of all
    else, (G, R, block_m, 1) each. do comes times the share, and the second becomes rowsum(dO * O) of the whole.
    """
    dq = torch.empty_like(q)
    q_flat, k_flat, v_flat, do_flat, dq_flat, dk_flat, dv_flat = (x.flatten(0, 1) for x in (q, k, v, do, dq, dk, dv))
    block = (-1, k.shape[2], k.shape[3])
    padding = k.shape[1] * k.shape[2] - length
    for rows, blocks, ends, hidden in _critical_chunks(q, k, kv_indices, counts, filled):
        q_c, do_c = q_flat[rows], do_flat[rows]
        gathered = (len(ends), -1, k.shape[3])
        k_c = k_flat.index_select(0, blocks).view(gathered)
        bias_c = None if bias is None else bias.flatten(0, 1)[rows]
        p = torch.softmax(_critical_scores(q_c, k_c, ends, padding, bias_c, hidden), -1)
        dv_flat.index_add_(0, blocks, torch.bmm(p.mT, do_c).view(block))
        dp = torch.bmm(do_c, v_flat.index_select(0, blocks).view(gathered).mT)
        delta = (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse.flatten(0, 1)[rows, :, None]
        if merged is not None:
            share, total = (x.flatten(0, 1)[rows] for x in merged)
            delta = total.add_(delta) * share
        ds = dp.sub_(delta).mul_(p)
        if dbias is not None:
            dbias.flatten(0, 1)[rows] = ds.sum(1).unflatten(1, (-1, k.shape[2])).sum(2)
        torch.bmm(ds, k_c, out=dq_flat[rows])
        dk_flat.index_add_(0, blocks, torch.bmm(ds.mT, q_c).view(block))
    return dq
