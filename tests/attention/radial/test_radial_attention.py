"""What holds for Radial Attention in every backend, and its mask against loops over tokens."""

import pytest
import torch
import torch.nn.functional as F
from kept_keys import NAMES, assert_kept_within_budget, draw, grid_name
from numerics import make_qkv, results, strided
from torch.autograd import gradcheck

from slagen.attention.protocol import Grid
from slagen.attention.radial.config import RadialConfig
from slagen.attention.radial.functional import kept_tokens, radial_attention
from slagen.attention.radial.mask import radial_mask
from slagen.errors import UsageError

CPU = torch.device("cpu")
BACKENDS = ["reference", "torch"]
# Frames of a whole number of blocks, of parts of several blocks, of less than a block, of one token, and one frame.
GRIDS = [Grid(*sizes) for sizes in ((9, 4, 8), (4, 5, 9), (7, 3, 5), (6, 1, 1), (1, 6, 7), (3, 10, 13))]


def radial(block_m=16, block_n=16, **changes):
    return RadialConfig(block_m=block_m, block_n=block_n, **changes)


def attend(config, grid, backend):
    return lambda q, k, v: radial_attention(q, k, v, config, grid, backend=backend)


def mask_by_loops(config, grid):
    """The blocks kept, by the formulas alone: one token, then one block at a time, with whole numbers."""
    length, size, block = grid.num_tokens, grid.height * grid.width, config.block_n

    def sees(query, key):
        (i, r), (j, c) = divmod(query, size), divmod(key, size)
        d = abs(i - j)
        if j == 0 or d == 0:
            return True
        width = 2 ** len(f"{size:b}") / 2 ** len(f"{d:b}")
        if width < block and d % int(block / width):
            return False
        return abs(r - c) <= (size // 2 if d == 1 else max(block, config.decay_factor * width))

    kept = []
    for first in range(0, length, config.block_m):
        queries = range(first, min(first + config.block_m, length))
        row = []
        for start in range(0, length, block):
            keys = range(start, min(start + block, length))
            seen = [sum(sees(query, key) for query in queries) for key in keys]
            dense = [number for number in seen if 3 * number > len(queries)]
            any_seen = [number for number in seen if number > 0]
            row.append(len(dense) * 10 > len(any_seen) * 6 or bool(set(queries) & set(keys)))
        kept.append(row)
    return torch.tensor(kept)


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_mask_agrees_with_loops_over_tokens(grid, sizes):
    config = radial(*sizes, decay_factor=0.7)
    assert torch.equal(radial_mask(config, grid, CPU).kept, mask_by_loops(config, grid))


def test_the_band_narrows_and_frames_are_left_out():
    """512 tokens in a frame, blocks of 64: bands of 512, 256, then decay_factor times 1024 / 4 and 1024 / 8, and from
    16 frames on, where that is 32 without the factor, only every second frame, then every fourth."""
    config = RadialConfig(block_m=64, block_n=64, decay_factor=0.5)
    assert [config.reach(d, 512) for d in (0, 1, 2, 3, 4, 7, 8)] == [512, 256, 128, 128, 64, 64, 64]
    assert [config.reach(d, 512) for d in (17, 18, 31, 32, 34, 36)] == [None, 64, None, 64, None, 64]
    assert RadialConfig(decay_factor=1e300).reach(2, 512) == 512


def test_the_first_frame_is_seen_by_all():
    kept = radial_mask(radial(), Grid(9, 4, 8), CPU).kept
    assert kept[:, :2].all() and not kept[2:, 2:].all()


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_torch_equals_reference(grid, sizes):
    """Output and gradients agree to rounding in float64."""
    inputs, do = draw(grid)
    expected, actual = (results(attend(radial(*sizes), grid, backend), inputs, do) for backend in BACKENDS)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_reference_is_masked_attention():
    grid = Grid(4, 5, 9)
    (q, k, v), _ = draw(grid)
    kept = mask_by_loops(radial(), grid).repeat_interleave(16, 0).repeat_interleave(16, 1)[:180, :180]
    assert not kept.all()
    o = radial_attention(q, k, v, radial(), grid, backend="reference")
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, kept), rtol=1e-12, atol=1e-12)


def test_inputs_are_left_as_they_are():
    """Of whole blocks in contiguous memory the operator gets the inputs themselves, not copies."""
    grid = Grid(9, 4, 8)
    inputs, do = draw(grid, torch.float32)
    before = [x.clone() for x in (*inputs, do)]
    results(attend(radial(), grid, "torch"), inputs, do)
    assert all(torch.equal(x, b) for x, b in zip((*inputs, do), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_is_within_budget(dtype):
    grid = Grid(4, 5, 9)
    inputs, do = draw(grid, dtype, dim=8)
    config, view = radial(), [strided(x) for x in inputs]
    actual = results(attend(config, grid, "torch"), view, do)
    kept = kept_tokens(radial_mask(config, grid, CPU), config)
    assert_kept_within_budget(actual, inputs, do, attend(config, grid, "reference"), kept, torch.float32)


def test_gradcheck():
    grid = Grid(4, 3, 4)
    assert not radial_mask(radial(), grid, CPU).kept.all()
    inputs = make_qkv((1, 2, 48, 2), requires_grad=True)
    assert gradcheck(attend(radial(), grid, "torch"), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_keeps_all_is_dense_attention(backend):
    """Three frames of one block each see each other whole."""
    grid = Grid(3, 4, 4)
    assert radial_mask(radial(), grid, CPU).kept.all()
    inputs, do = draw(grid)
    expected = results(F.scaled_dot_product_attention, inputs, do)
    for a, e in zip(results(attend(radial(), grid, backend), inputs, do), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_autocast_changes_nothing():
    grid = Grid(4, 5, 9)
    inputs, do = draw(grid, torch.float32)
    expected = results(attend(radial(), grid, "torch"), inputs, do)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(attend(radial(), grid, "torch"), inputs, do)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float16, (16, 16)), (torch.float32, (32, 16))], ids=str)
def test_triton_is_within_budget(dtype, sizes):
    """In the interpreter: rows that keep different numbers of blocks, and a length that ends within a block."""
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid, config = Grid(4, 3, 5), radial(*sizes)
    mask = radial_mask(config, grid, CPU)
    assert len(set(mask.kept.sum(1).tolist())) > 1
    inputs, do = make_qkv((1, 2, 60, 16), dtype), make_qkv((1, 2, 60, 16), dtype, seed=2)[0]
    placed = [strided(x.to(device)) for x in inputs]
    actual = [x.cpu() for x in results(attend(config, grid, "triton"), placed, do.to(device))]
    kept = kept_tokens(mask, config)
    assert_kept_within_budget(actual, inputs, do, attend(config, grid, "reference"), kept, dtype)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"decay_factor": 0}, "decay_factor is 0, but must be a finite number above 0. Try --decay-factor 0.2."),
        ({"decay_factor": float("inf")}, "decay_factor is inf"),
        ({"decay_factor": 10**400}, r"decay_factor is 1000.* \(401 digits\), but must be a finite number above 0"),
        ({"decay_factor": float("nan")}, "decay_factor is nan"),
        ({"decay_factor": True}, "decay_factor is True"),
        ({"block_n": 48}, "block_n is 48, but must be one of 16, 32, 64, 128"),
    ],
)
def test_what_is_out_of_range(fields, said):
    with pytest.raises(UsageError, match=said):
        RadialConfig(**fields)


@pytest.mark.parametrize(
    ("grid", "options", "said"),
    [
        (None, {}, "the grid of the 48 tokens is unknown"),
        (Grid(4, 3, 5), {}, "4 x 3 x 5 has 60 tokens, but the sequence has 48"),
        (radial_mask(radial(), Grid(4, 3, 5), CPU), {}, "the grid of the mask has 60 tokens, but q has 48"),
        (Grid(4, 3, 4), {"backend": "sdpa"}, "backend is 'sdpa'; it must be one of auto, reference, torch, triton"),
    ],
)
def test_what_it_does_not_take(grid, options, said):
    with pytest.raises(ValueError, match=said):
        radial_attention(*make_qkv((1, 1, 48, 4)), radial(), grid, **options)
