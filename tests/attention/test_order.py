"""Cube order: a bijection of a grid's tokens, whose blocks are cubes, with true counts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import make_qkv, results

from slagen.attention import sparse_linear_attention
from slagen.attention.cubes import CUBE_TOKENS, check_tokens, num_cubes
from slagen.attention.order import cube_order, from_slots, to_slots
from slagen.attention.protocol import Grid
from slagen.attention.sla.config import SLAConfig

CPU = torch.device("cpu")
GRIDS = [
    Grid(*sizes)
    for sizes in ((1, 1, 1), (4, 4, 4), (8, 4, 12), (3, 5, 7), (5, 8, 8), (4, 6, 4), (4, 4, 5), (2, 7, 13), (5, 6, 13))
]


def name(grid):
    return f"{grid.num_frames}x{grid.height}x{grid.width}"


def members(grid, sides=(4, 4, 4)):
    """The tokens of each cube, in raster order, by loops."""
    sizes = (grid.num_frames, grid.height, grid.width)
    index = {place: i for i, place in enumerate(itertools.product(*map(range, sizes)))}
    starts = itertools.product(*map(range, (0, 0, 0), sizes, sides))
    holds = lambda start, place: all(s <= x < s + n for s, x, n in zip(start, place, sides, strict=True))  # noqa: E731
    return [[i for place, i in index.items() if holds(start, place)] for start in starts]


@pytest.mark.parametrize("sides", [(4, 4, 4), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_slots_hold_the_tokens_of_each_cube(grid, sides):
    cubes, expected = cube_order(grid, CPU, sides), members(grid, sides)
    rows = torch.full((num_cubes(grid, sides) * CUBE_TOKENS,), -1)
    rows[cubes.slots] = torch.arange(grid.num_tokens)
    held = [[i for i in row if i >= 0] for row in rows.view(-1, CUBE_TOKENS).tolist()]
    assert held == expected
    assert cubes.counts.tolist() == [len(tokens) for tokens in expected]
    assert cubes.ragged == any(len(tokens) < CUBE_TOKENS for tokens in expected)
    assert all(row[len(tokens):] == [-1] * (64 - len(tokens))
               for row, tokens in zip(rows.view(-1, 64).tolist(), expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_sequence_is_a_permutation_whole_cubes_first(grid):
    cubes, length = cube_order(grid, CPU), grid.num_tokens
    assert sorted(cubes.order.tolist()) == list(range(length))
    assert cubes.order[cubes.inverse].tolist() == list(range(length))
    whole = [tokens for tokens in members(grid) if len(tokens) == CUBE_TOKENS]
    assert cubes.order[: len(whole) * 64].tolist() == list(itertools.chain(*whole))
    pieces, rest = [tokens for tokens in members(grid) if len(tokens) < 64], cubes.order[len(whole) * 64 :].tolist()
    while rest:  # each ragged cube lies in one piece
        piece = next(tokens for tokens in pieces if tokens[0] == rest[0])
        assert rest[: len(piece)] == piece
        rest = rest[len(piece) :]


def test_blocks_of_16_and_32_are_frames_of_a_cube():
    grid = Grid(8, 8, 8)
    place = torch.stack(torch.meshgrid(*map(torch.arange, (8, 8, 8)), indexing="ij"), -1).view(-1, 3)
    for block, frames in ((16, 1), (32, 2), (64, 4)):
        for tokens in cube_order(grid, CPU).order.view(-1, block):
            spans = (place[tokens].amax(0) - place[tokens].amin(0) + 1).tolist()
            assert spans == [frames, 4, 4]


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_means_are_over_true_counts(grid):
    x = make_qkv((2, 3, grid.num_tokens, 5))[0]
    expected = torch.stack([x[:, :, tokens].mean(2) for tokens in members(grid)], 2)
    torch.testing.assert_close(cube_order(grid, CPU).means(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_slots_and_back(grid):
    """There and back is the identity, padding is zero, and gradients pass through both."""
    cubes = cube_order(grid, CPU)
    x = make_qkv((1, 2, grid.num_tokens, 3), requires_grad=True)[0]
    rows = to_slots(x, cubes.slots, num_cubes(grid))
    back = from_slots(rows, cubes.slots)
    assert torch.equal(back, x)
    assert rows.count_nonzero() == x.count_nonzero()
    weights = torch.arange(x.numel(), dtype=x.dtype).view_as(x)
    back.backward(weights)
    assert torch.equal(x.grad, weights)


def test_dense_attention_does_not_depend_on_the_order():
    """o and every gradient are those of raster order."""
    grid = Grid(5, 6, 7)
    inputs, do = make_qkv((1, 2, grid.num_tokens, 8)), make_qkv((1, 2, grid.num_tokens, 8), seed=2)[0]
    dense = F.scaled_dot_product_attention
    actual = results(lambda *x: cube_order(grid, CPU).reordered(dense, *x), inputs, do)
    for a, e in zip(actual, results(dense, inputs, do), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_sla_in_cube_order_chooses_cubes():
    """SLA's blocks of 64 are then cubes: what it attends to is what moves into its output."""
    grid, config = Grid(8, 8, 8), SLAConfig(sparsity=0.75)
    q, k, _ = make_qkv((1, 1, grid.num_tokens, 8))
    v = torch.eye(grid.num_tokens, dtype=q.dtype)[None, None]  # o holds the weights
    wide = torch.zeros(1, 1, grid.num_tokens, grid.num_tokens - 8, dtype=q.dtype)
    q, k = torch.cat([q, wide], -1), torch.cat([k, wide], -1)

    def attend(q, k, v):
        return sparse_linear_attention(q, k, v, config, scale=0.3)

    o = cube_order(grid, CPU).reordered(attend, q, k, v)[0, 0]
    for tokens in members(grid):
        kept = [i for i, other in enumerate(members(grid)) if o[tokens][:, other].any()]
        assert len(kept) == 2
        assert all((o[tokens][:, members(grid)[i]] > 0).all() for i in kept)


def test_made_once_for_a_grid():
    assert cube_order(Grid(5, 6, 7), CPU) is cube_order(Grid(5, 6, 7), CPU)


def test_made_in_inference_mode_it_serves_training():
    with torch.inference_mode():
        cubes = cube_order(Grid(2, 3, 9), CPU)
    x = make_qkv((1, 1, 54, 2), requires_grad=True)[0]
    cubes.means(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("grid", "told"),
    [(Grid(2, 3, 4), "2 x 3 x 4 has 24 tokens, but the sequence has 25"), (None, "25 tokens is unknown")],
    ids=["other", "none"],
)
def test_refuses_a_grid_of_another_length(grid, told):
    with pytest.raises(ValueError, match=told) as caught:
        check_tokens(grid, 25)
    assert "\n" not in str(caught.value)
