"""Sparse attention of other libraries that `slagen bench` compares with SLA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slagen.attention.protocol import Attend, Unavailable
from slagen.attention.sla.block_map import CRITICAL, block_map, block_scores
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark.methods import Contender, Setting


def select(q: Tensor, k: Tensor, config: SLAConfig) -> Tensor:
    """List the critical blocks of each row as `critical_indices` does, (B, H, M, topk), without waiting for the device.

    A stable sort leaves blocks of equal score in the order of their index; adding 0 makes -0 equal to 0.
    """
    order = (block_scores(q, k, config) + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order[..., : config.num_critical(order.shape[-1])].sort(dim=-1).values


def block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """How many tokens each block holds: (ceil(length / block),) int32; the last may be partial."""
    starts = torch.arange(0, length, block, dtype=torch.int32, device=device)
    return (length - starts).clamp(max=block)


def _flex(setting: Setting) -> Attend:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, options={"max_autotune": True})
    tiles: Any = _flex_tiles(setting)  # PyTorch's type for them lacks the prefixes that its text documents

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, length = setting.config, q.shape[2]
        kv_indices = select(q, k, config)
        num_columns, topk = config.num_blocks(length)[1], kv_indices.shape[3]
        kept = torch.full(kv_indices.shape[:3], topk, dtype=torch.int32, device=q.device)
        mask = BlockMask.from_kv_blocks(
            kept, F.pad(kv_indices, (0, num_columns - topk)).int(), BLOCK_SIZE=(config.block_m, config.block_n),
            seq_lengths=(length, length), compute_q_blocks=torch.is_grad_enabled(),
        )  # fmt: skip
        return compiled(q, k, v, block_mask=mask, kernel_options=tiles)

    return attend


def _flex_tiles(setting: Setting) -> dict[str, int] | None:
    """Tiles that divide the blocks, for CUDA; on a CPU FlexAttention chooses its own.

    PyTorch's one default for Hopper and D = 128 is 128 x 64 forward and 64 x 128 backward, and with smaller blocks that
    raises. Backward, PyTorch drops such a default before it looks at these options; among the candidates that
    "max_autotune" adds some are left. Those give warps and stages, and these options the tiles.
    """
    if setting.device.type != "cuda":
        return None
    config, wide = setting.config, setting.weight.shape[0] * setting.dtype.itemsize > 256
    m, n = min(config.block_m, 32 if wide else 128), min(config.block_n, 32 if wide else 64)
    small = min(m, n)
    return {
        "fwd_BLOCK_M": m, "fwd_BLOCK_N": n,
        "bwd_BLOCK_M1": small, "bwd_BLOCK_N1": small, "bwd_BLOCK_M2": small, "bwd_BLOCK_N2": small,
    }  # fmt: skip


def _cudnn_blocks(setting: Setting) -> Attend:
    """cuDNN's block-sparse attention (BSA). On Hopper it takes whole blocks of queries, so the last one is padded."""
    try:
        from cudnn import BSA
    except ImportError as error:
        raise Unavailable(
            "no block-sparse attention in this version. Try pip install --upgrade nvidia-cudnn-frontend."
        ) from error
    config = setting.config
    block = config.block_n
    if config.block_m != block or block not in (64, 128):
        raise Unavailable(f"only blocks of 64 x 64 or 128 x 128 are supported, not {config.block_m} x {block}")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        kv_indices = select(q, k, config).int()
        padded = F.pad(q, (0, 0, 0, -length % block)) if length % block else q
        result = BSA.block_sparse_attention_forward(
            padded, k, v, kv_indices, block_sparse_num=kv_indices.shape[3],
            block_sizes=block_sizes(length, block, q.device), sparse_block_size=block,
        )  # fmt: skip
        return result["o_tensor"][:, :, :length]

    return attend


def _flashinfer_blocks(setting: Setting) -> Attend:
    """FlashInfer's attention over blocks of any size. Each call plans anew, as a new selection takes."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    config = setting.config
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(2**27, dtype=torch.uint8, device=setting.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, head_dim = q.shape[2:]
        kept = (block_map(block_scores(q, k, config), config) == CRITICAL).flatten(0, 1)
        heads = len(kept)
        rows, columns = (
            block_sizes(length, block, q.device).expand(heads, -1) for block in (config.block_m, config.block_n)
        )
        wrapper.plan(kept, rows, columns, heads, heads, head_dim, q_data_type=q.dtype)
        return wrapper.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)

    return attend


def _public_sla(setting: Setting) -> Attend:
    from sparse_linear_attention import SparseLinearAttention

    config = setting.config
    if config.linear_domain != "all":
        raise Unavailable("only the linear domain 'all' is supported")
    module = SparseLinearAttention(
        head_dim=setting.weight.shape[0], topk=1 - config.sparsity, feature_map=config.feature_map,
        BLKQ=config.block_m, BLKK=config.block_n,
    ).to(setting.device)  # fmt: skip
    with torch.no_grad():
        module.proj_l.weight.copy_(setting.weight)
        module.proj_l.bias.copy_(setting.bias)
    return module


OTHER_LIBRARIES = (
    Contender("flex", "sparse", _flex),
    Contender("cudnn-blocks", "sparse", _cudnn_blocks, backward=False, package="cudnn"),
    Contender("flashinfer-blocks", "sparse", _flashinfer_blocks, backward=False, package="flashinfer"),
    Contender("sla-public", "sla", _public_sla, package="sparse_linear_attention"),
)
