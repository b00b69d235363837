"""Sparse-linear attention in a model of your own: a small transformer block that learns to copy dense attention.

python examples/other_model.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slagen import SLAConfig, SparseLinearAttention


class Block(nn.Module):
    """Self-attention with a residual connection; x is (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        config = SLAConfig(sparsity=0.75, block_m=16, block_n=16)
        self.attention = SparseLinearAttention(width // heads, config)  # its projection begins at zero

    def forward(self, x: Tensor, dense: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, D)
        o = F.scaled_dot_product_attention(q, k, v) if dense else self.attention(q, k, v)
        return x + self.out(o.transpose(1, 2).flatten(2))


torch.manual_seed(0)
block = Block(width=64, heads=4)
teacher = Block(width=64, heads=4).requires_grad_(False)
teacher.load_state_dict(block.state_dict())
optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
for step in range(61):
    x = torch.randn(2, 256, 64)
    wanted = teacher(x, dense=True) - x  # what dense attention adds
    error = (block(x) - x - wanted).norm() / wanted.norm()
    if step % 20 == 0:
        print(f"step {step:3}: relative error to dense attention {error.item():.3f}")
    optimizer.zero_grad()
    error.backward()
    optimizer.step()
