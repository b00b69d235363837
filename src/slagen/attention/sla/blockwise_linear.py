"""The linear branch block by block: one state for each block of keys, mixed over the domain of each query block.

A state is, for each feature d, the mean of the values with weights phi(k_j)_d, and the log of the sum of those weights.
Means are mixed over the domain of each query block, and over the features:

    z_nd = sum_j phi(k_j)_d        H_nd = sum_j phi(k_j)_d v_j / z_nd        over the keys j of block n
    z_d  = sum_n z_nd              H_d  = sum_n (z_nd / z_d) H_nd            over the blocks n of the domain
    u_id = phi(q_i)_d z_d / (phi(q_i) . z + e)        O^l_i = sum_d u_id H_d

Every quotient lies in [0, 1] and is the exponential of a difference of logs, so features far apart neither overflow
nor vanish from both sides of a fraction. The gradients are products of the same quotients.

In the domain "all" one state serves every query, so W is multiplied into it once. With softmax features no
logarithm is needed. The state is the sums divided by L, H z / L and z / L + e / L, where e / L may be added to every
feature because the features of a query sum to 1:

    O^l_i = phi(q_i) . (H z / L) / phi(q_i) . (z / L + e / L)

Nothing overflows, because phi(k_j)_d <= 1, and where z_d vanishes, so does its part of O^l, because of e.

In "marginal" mixing is one matrix product, of the 0/1 domain (M, N) with the means (N, D * D) times z_nd / Z_d, where
Z_d sums over all blocks, and z_d / Z_d is divided out again: D N / (2 block_m block_n topk) of the sparse branch's
operations, a third for D = 128, blocks of 64 and one block in 20, whatever L is. Where z_d / Z_d is hardly a number of
the dtype for some query block and feature, the run of that block takes every z_nd / z_d by itself, and one matrix
product for each feature.

A domain may also be of degrees: c_in in [0, 1] of key block n for query block i, given as log c. Every z_nd above is
then c_in z_nd. The gradient of log c_in is that of log z_nd, summed over the features and the rows of the block.

The states are the logs of z (G, N, D) and the means H (G, N, D, D), one for each key block, or with N = 1 for the
domain "all", or the sums above; G, R and blocks are as in `blocks.py`. The log of 0 is -inf.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slagen.attention.sla.blocks import in_a_run
from slagen.attention.sla.config import FeatureMap, SLAConfig
from slagen.attention.sla.reference import EPSILON

Unmix = Callable[[Tensor, Tensor, Tensor | None], None]  # see `_mix`


def _join(x: Tensor, config: SLAConfig) -> Tensor:
    """Make one block of all, (G, 1, rows, D), for the domain "all", where every block meets the same state."""
    return x.flatten(1, 2).unsqueeze(1) if config.linear_domain == "all" else x


def _is_of_sums(config: SLAConfig) -> bool:
    """Whether the one state holds sums; see the head of this file."""
    return config.linear_domain == "all" and config.feature_map == "softmax"


def _key_weights(k: Tensor, config: SLAConfig, length: int) -> Iterator[tuple[slice, Tensor]]:
    """Split the key blocks as `_key_runs`: slices of blocks, and phi(K) / L, 0 after the end."""
    step = in_a_run(4 * k[:, 0].numel())
    for j in range(0, k.shape[1], step):
        weights = k[:, j : j + step].softmax(-1).mul_(1 / length)
        weights.flatten(1, 2)[:, max(0, length - j * k.shape[2]) :] = 0
        yield slice(j, j + step), _join(weights, config)


def _key_runs(k: Tensor, config: SLAConfig, length: int) -> Iterator[tuple[slice, Tensor]]:
    """Split the key blocks into runs of about RUN_BYTES: slices of blocks, and log phi(K), -inf after the end."""
    step = in_a_run(4 * k[:, 0].numel())
    for j in range(0, k.shape[1], step):
        logs = _feature_logs(k[:, j : j + step], config.feature_map)
        logs.flatten(1, 2)[:, max(0, length - j * k.shape[2]) :] = -torch.inf
        yield slice(j, j + step), _join(logs, config)


def key_states(k: Tensor, v: Tensor, config: SLAConfig, length: int) -> tuple[Tensor, Tensor]:
    """Log z and H of each key block, or of all; or of all, z / L + e / L and H z / L."""
    if _is_of_sums(config):
        z, sums = k.new_full((len(k), 1, k.shape[3]), EPSILON["all"] / length), k.new_zeros(1)
        for run, weights in _key_weights(k, config, length):
            z += weights.sum(2)
            sums = sums + weights.mT @ _join(v[:, run], config)
        return z, sums
    parts = []
    for run, logs in _key_runs(k, config, length):
        weights, z = _normalise(logs, 2)
        parts.append((z, weights.mT @ _join(v[:, run], config)))
    if len(parts) == 1:
        return parts[0]
    z, means = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    if config.linear_domain == "all":
        shares, z = _normalise(z, 1, keepdim=True)
        means = (shares[..., None] * means).sum(1, keepdim=True)
    return z, means


def _normalise(logs: Tensor, dim: int, eps: float = 0.0, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Exponentials divided by eps and their sum over a dimension, 0 where that is 0; and the log of their sum."""
    shift = logs.amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = (logs - shift).exp_()
    total = weights.sum(dim, keepdim=True)
    divisor = total + eps * torch.exp(-shift) if eps else total
    z = shift + total.log()
    return weights.div_(divisor.masked_fill(divisor == 0, 1)), z if keepdim else z.squeeze(dim)


def _mix(z: Tensor, means: Tensor, domain: Tensor) -> tuple[Tensor, Tensor, Tensor, Unmix]:
    """Mix the states over the domain (G, R, N) of each query block, bool or log c; see the head of this file.

    Returns: log z_d, (G, R, D); H_d times a total, (G, R, D, D); the total, (G, R, D): z_d / Z_d, or 1 where that is 0
    and from `_mix_each`; and a function that adds the gradients of the query blocks' states, divided by the total, to
    those of the key blocks' states, both as `states_backward` takes them, and writes the gradient of log c if asked.
    """
    shares, log_sum = _normalise(z, 1, keepdim=True)
    mask = domain.to(z.dtype) if domain.dtype == torch.bool else domain.exp()
    total = mask @ shares
    if ((total < torch.finfo(z.dtype).tiny ** 0.5) & (mask @ (z > -torch.inf).to(z.dtype) > 0)).any():
        return _mix_each(z, means, domain)
    shares = shares[..., None]
    sums = (mask @ (shares * means).flatten(2)).unflatten(2, means.shape[2:])

    def unmix(dsums: Tensor, dstates: Tensor, ddomain: Tensor | None) -> None:
        dstates.addcmul_((mask.mT @ dsums.flatten(2)).unflatten(2, dsums.shape[2:]), shares)
        if ddomain is not None:
            states = torch.cat([means, torch.ones_like(means[..., :1])], -1).mul_(shares)
            torch.mul(dsums.flatten(2) @ states.flatten(2).mT, mask, out=ddomain)

    return log_sum + total.log(), sums, total.masked_fill(total == 0, 1), unmix


def _mix_each(z: Tensor, means: Tensor, domain: Tensor) -> tuple[Tensor, Tensor, Tensor, Unmix]:
    """As `_mix`, by z_nd / z_d of each query block, key block and feature: slower by that many exponentials."""
    logs = domain.to(z.dtype).log() if domain.dtype == torch.bool else domain
    shares, z = _normalise(z[:, None] + logs[..., None], 2)
    shares = shares.permute(0, 3, 1, 2).contiguous()  # (G, D, R, N)

    def unmix(dsums: Tensor, dstates: Tensor, ddomain: Tensor | None) -> None:
        dsums = dsums.transpose(1, 2)
        dstates.add_((shares.mT @ dsums).transpose(1, 2))
        if ddomain is not None:
            of_states = torch.cat([means, torch.ones_like(means[..., :1])], -1).transpose(1, 2)
            torch.sum((dsums @ of_states.mT).mul_(shares), 1, out=ddomain)

    return z, (shares @ means.transpose(1, 2)).transpose(1, 2), torch.ones_like(z), unmix


def _state_weights(k: Tensor, config: SLAConfig, length: int, z: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Split the key blocks into runs: slices of blocks, of their states, and how much of its state each key makes."""
    if _is_of_sums(config):
        yield from ((run, slice(None), weights) for run, weights in _key_weights(k, config, length))
        return
    z = z.masked_fill(z == -torch.inf, 0)
    for run, logs in _key_runs(k, config, length):
        where = slice(None) if config.linear_domain == "all" else run
        yield run, where, (logs - z[:, where, None]).exp_()


def states_backward(
    k: Tensor, v: Tensor, config: SLAConfig, length: int, z: Tensor, dstates: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add to dk and dv; the gradients of the states are those of sums, not of means: they come mixed."""
    for run, where, weights in _state_weights(k, config, length, z):
        dsums, dtotal = dstates[:, where, :, :-1], dstates[:, where, None, :, -1]
        dlogs = (_join(v[:, run], config) @ dsums.mT).add_(dtotal).mul_(weights)
        dk[:, run] += _feature_logs_backward(dlogs.view(dk[:, run].shape), k[:, run], config.feature_map)
        dv[:, run] += (weights @ dsums).view(dv[:, run].shape)


def linear_rows(
    q: Tensor, z: Tensor, means: Tensor, domain: Tensor | None, config: SLAConfig
) -> tuple[Tensor, Tensor, Tensor | None, Unmix | None, Tensor]:
    """u over the total, then H times the total, the total and the function of `_mix`, or H, None and None; and O^l."""
    if _is_of_sums(config):
        weights = _join(q.softmax(-1), config)
        weights.div_(weights @ z[..., None])
        return weights, means, z, None, weights @ means
    total = unmix = None
    if domain is not None:
        z, means, total, unmix = _mix(z, means, domain)
    if config.feature_map == "softmax" and EPSILON[config.linear_domain] == 0:
        logs = q - q.amax(-1, keepdim=True)  # the denominator of phi cancels
    else:
        logs = _feature_logs(q, config.feature_map)
    weights, _ = _normalise(_join(logs, config) + z[:, :, None], 3, EPSILON[config.linear_domain])
    if total is not None:
        weights.div_(total[:, :, None])
    return weights, means, total, unmix, weights @ means


def linear_backward(
    q: Tensor,
    z: Tensor,
    means: Tensor,
    domain: Tensor | None,
    config: SLAConfig,
    do: Tensor,
    dstates: Tensor,
    ddomain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to dstates, write ddomain, the gradient of log c, and return dq and O^l; do is the gradient of O^l."""
    weights, sums, total, unmix, o_linear = linear_rows(q, z, means, domain, config)
    do = _join(do, config)
    delta = (do * o_linear).sum(-1, keepdim=True)
    dstate = weights.mT @ torch.cat([do, -delta], -1)
    if unmix is None:
        dstates += dstate
    else:
        unmix(dstate, dstates, ddomain)
    dlogs = do @ sums.mT
    dlogs = dlogs.sub_(delta) if total is None else dlogs.addcmul_(delta, total[:, :, None], value=-1)
    return _feature_logs_backward(dlogs.mul_(weights).view(q.shape), q, config.feature_map), o_linear


def _feature_logs(x: Tensor, name: FeatureMap) -> Tensor:
    """Log phi(x)."""
    if name == "softmax":
        return x.log_softmax(-1)
    return torch.where(x < 0, x, x.clamp(min=0).log1p()) if name == "elu" else x.relu().log()


def _feature_logs_backward(dlogs: Tensor, x: Tensor, name: FeatureMap) -> Tensor:
    """Gradient of x, given that of log phi(x)."""
    if name == "softmax":
        return dlogs - x.softmax(-1) * dlogs.sum(-1, keepdim=True)
    if name == "elu":
        return dlogs / (x.clamp(min=0) + 1)
    return dlogs / x.masked_fill(x <= 0, 1)  # where x <= 0, dlogs is 0
