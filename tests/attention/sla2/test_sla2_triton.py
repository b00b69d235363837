"""SLA2 on SLA's fused kernels, in Triton's interpreter where there is no CUDA device."""

import pytest
import torch
from numerics import results
from test_sla2 import attend, small
from test_sla2_numerics import case, check

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "smooth"),
    [((1, 2, 17, 16), True), ((1, 2, 17, 16), False), ((1, 1, 75, 16), True)],
    ids=["two-heads", "two-heads-plain-keys", "L75"],
)
def test_kernels_are_within_budget(shape, smooth, dtype):
    """o and every gradient, of the logits too; the router, which learns from degrees only, has none."""
    config = small(smooth_keys=smooth)
    inputs, do = case(dtype, shape, config)
    inputs, do = [x.to(DEVICE) for x in inputs], do.to(DEVICE)
    found = results(attend(config, "triton"), inputs, do)
    check(found, inputs, do, config, dtype, soft=False)
    assert not found[4].any() and not found[5].any()


def test_kernels_keep_what_the_router_chooses():
    """o is that of the torch backend where the router is far from the identity."""
    config = small()
    inputs, _ = case(torch.float32, (1, 1, 75, 16), config)
    generator = torch.Generator().manual_seed(3)
    inputs[3:5] = [torch.randn(16, 16, generator=generator) for _ in range(2)]
    inputs = [x.to(DEVICE) for x in inputs]
    o, expected = (attend(config, backend)(*inputs) for backend in ("triton", "torch"))
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-5)


def test_all_blocks_kept_is_dense():
    (q, k, v, *weights), _ = case(torch.float32, (1, 1, 40, 16))
    inputs = [x.to(DEVICE) for x in (q, k, v, *weights)]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    torch.testing.assert_close(attend(small(sparsity=0.0), "triton")(*inputs), expected, rtol=0, atol=1e-5)
