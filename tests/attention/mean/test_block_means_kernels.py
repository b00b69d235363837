"""The Triton kernels of `mean` and `sol` against the float64 reference, in the interpreter or on a GPU."""

import pytest
import torch
from numerics import make_qkv, results, strided
from test_block_means import assert_within_budget, attend, mean, sol

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from slagen.attention.mean import fused  # noqa: E402
from slagen.errors import KernelProblem  # noqa: E402
from slagen.kernels import block_means  # noqa: E402

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter computes bfloat16 wrongly
]


def check(shape, dtype, config, view=lambda x: x):
    """Forward and backward are within the error budget."""
    inputs, do = [view(x.to(DEVICE)) for x in make_qkv(shape, dtype)], make_qkv(shape, dtype, seed=2)[0].to(DEVICE)
    actual = results(attend(config, "triton"), inputs, do)
    assert_within_budget([x.cpu() for x in actual], [x.cpu() for x in inputs], do.cpu(), config, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 16, 17, 75])
@pytest.mark.parametrize("config", [mean(), sol(block_n=32), sol(tau=9.0, block_m=32)], ids=str)
def test_numbers(config, length, dtype):
    """Rows that keep different numbers of blocks, and lengths that end within a block."""
    check((1, 1, length, 16), dtype, config)


@pytest.mark.parametrize("config", [mean(sparsity=0.0), sol(tau=-1e9), mean(sparsity=0.99)], ids=str)
def test_all_blocks_and_one(config):
    check((2, 1, 75, 16), torch.float32, config)


def test_more_means_than_a_tile(monkeypatch):
    """The kernel walks over several tiles of means, the last of which is not full."""
    monkeypatch.setattr(block_means, "MEANS", 16)
    check((1, 1, 300, 16), torch.float32, sol(tau=9.0))


def test_strided():
    """Several batches and heads, as Wan hands them over."""
    check((2, 2, 40, 16), torch.float32, sol(), view=strided)


def test_runs_of_rows_of_the_backward_pass(monkeypatch):
    monkeypatch.setattr(fused, "SCORE_BYTES", 1)
    check((1, 2, 75, 16), torch.float32, sol(block_n=32))


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    config, device = sol(), torch.device(DEVICE)
    fused.check_kernels(16, device, torch.float32, config)
    whole = block_means.block_means_forward

    def wrong(*tensors, **options):
        o, lse = whole(*tensors, **options)
        return o * 1.1, lse

    monkeypatch.setattr(block_means, "block_means_forward", wrong)
    with pytest.raises(KernelProblem, match="o is wrong. Try --backend torch"):
        fused.check_kernels(16, device, torch.float32, config)


@pytest.mark.parametrize(
    ("failing", "error", "said"),
    [
        ("verify", KernelProblem("SLA's kernels fail. Try --backend torch."), "^SLA's kernels fail. Try"),
        ("_operator", torch.OutOfMemoryError("no memory is left"), "^no memory is left$"),
        ("_operator", RuntimeError("no driver"), "^the Triton kernels fail on .*: no driver. Try --backend torch.$"),
    ],
    ids=["sla", "memory", "launch"],
)
def test_what_a_trial_raises(failing, error, said, monkeypatch):
    """What SLA's own kernels say, and a lack of memory, are not reworded as a failure of these kernels."""

    def fail(*_):
        raise error

    monkeypatch.setattr(fused, failing, fail)
    expected = KernelProblem if type(error) is RuntimeError else type(error)
    with pytest.raises(expected, match=said):
        fused.check_kernels(16, torch.device(DEVICE), torch.float32, sol())
