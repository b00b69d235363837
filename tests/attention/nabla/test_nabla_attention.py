"""What holds for NABLA in every backend, and its selection against loops over tokens."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kept_keys import NAMES, assert_kept_within_budget, draw, grid_name
from numerics import make_qkv, results, strided
from torch.autograd import gradcheck

from slagen.attention.nabla.config import NablaConfig
from slagen.attention.nabla.cost import density_bound, tile_share
from slagen.attention.nabla.functional import nabla_attention
from slagen.attention.nabla.selection import kept_patches, patches_of, pooled_map
from slagen.attention.protocol import Grid
from slagen.errors import UsageError

CPU = torch.device("cpu")
BACKENDS = ["reference", "torch"]
# Whole patches, patches that end within 8 rows, 8 columns or both, and one patch.
GRIDS = [Grid(*sizes) for sizes in ((2, 8, 16), (3, 10, 8), (2, 8, 13), (3, 9, 11), (1, 5, 6))]
CONFIGS = [
    NablaConfig(top_p=0.5, sliding_tile="none"),
    NablaConfig(top_p=0.05, sliding_tile="none"),
    NablaConfig(top_p=0.3, sliding_tile="1x3x3"),
]


def attend(config, grid, backend):
    return lambda q, k, v: nabla_attention(q, k, v, config, grid, backend=backend)


def patch_of(grid):
    """The patch of each token in raster order, and the places of the patches, by loops."""
    sides, edges = (grid.num_frames, grid.height, grid.width), (1, 8, 8)
    places = list(itertools.product(*(range(math.ceil(n / edge)) for n, edge in zip(sides, edges, strict=True))))
    tokens = itertools.product(*map(range, sides))
    return [places.index(tuple(x // e for x, e in zip(token, edges, strict=True))) for token in tokens], places


def kept_by_loops(q, k, config, grid):
    """Of one head, in numpy, from the definition alone: the patches that each patch attends to."""
    patch, places = patch_of(grid)
    held = [[i for i, n in enumerate(patch) if n == p] for p in range(len(places))]
    kept = []
    for m, tokens in enumerate(held):
        mean = q[tokens].mean(0)
        weights = [len(keys) * math.exp(mean @ k[keys].mean(0) * q.shape[1] ** -0.5) for keys in held]
        row, mass = set(), 0.0
        for n in sorted(range(len(held)), key=lambda n: (-weights[n], n)):
            if mass < config.top_p:
                row.add(n)
            mass += weights[n] / sum(weights)
        if config.sliding_tile != "none":
            sizes = [int(x) // 2 for x in config.sliding_tile.split("x")]
            row |= {n for n, place in enumerate(places)
                    if all(abs(a - b) <= s for a, b, s in zip(place, places[m], sizes, strict=True))}  # fmt: skip
        kept.append(row)
    return kept


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_selection_agrees_with_loops(grid, config):
    (q, k, _), _ = draw(grid)
    found = kept_patches(3 * q, k, config, patches_of(grid, config.reach, CPU), q.shape[3] ** -0.5)
    for b, h in np.ndindex(2, 2):
        expected = kept_by_loops(3 * q[b, h].numpy(), k[b, h].numpy(), config, grid)
        assert [set(row.nonzero().flatten().tolist()) for row in found[b, h]] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.4, 0.7, 0.999, 1.0])
def test_kept_patches_hold_the_share_and_no_fewer_do(top_p, dtype):
    grid = Grid(6, 19, 21)
    (q, k, _), _ = draw(grid, dtype)
    config, q, eps = NablaConfig(top_p=top_p, sliding_tile="none"), 4 * q, 8 * torch.finfo(dtype).eps
    patches = patches_of(grid, None, CPU)
    weights = pooled_map(q, k, patches.order, q.shape[3] ** -0.5)
    kept = kept_patches(q, k, config, patches, q.shape[3] ** -0.5)
    mass = weights.where(kept, 0).sum(-1)
    assert (mass >= top_p - eps).all() and (kept.sum(-1) >= 1).all()
    smallest = weights.where(kept, torch.inf).amin(-1)
    assert ((mass - smallest <= top_p + eps) | (kept.sum(-1) == 1)).all()
    assert (smallest >= weights.where(~kept, 0).amax(-1)).all()
    assert not kept.all() if top_p < 0.9 else kept.sum() > 0.5 * kept.numel()


def test_of_equal_weights_the_first_are_kept():
    grid = Grid(4, 8, 8)
    q = make_qkv((1, 1, 256, 4))[0]
    config = NablaConfig(top_p=0.4, sliding_tile="none")
    kept = kept_patches(q, torch.zeros_like(q), config, patches_of(grid, None, CPU), 0.5)
    assert kept[0, 0].tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_torch_equals_reference(grid, config):
    """Output and gradients agree to rounding in float64."""
    inputs, do = draw(grid)
    expected, actual = (results(attend(config, grid, backend), inputs, do) for backend in BACKENDS)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def tokens_kept(q, k, config, grid):
    """The keys of each query by the selection under test, (B, H, L, L)."""
    patch = torch.tensor(patch_of(grid)[0])
    kept = kept_patches(q, k, config, patches_of(grid, config.reach, CPU), q.shape[3] ** -0.5)
    return kept[:, :, patch][..., patch]


def test_reference_is_masked_attention():
    grid, config = Grid(3, 9, 11), CONFIGS[0]
    (q, k, v), _ = draw(grid)
    kept = tokens_kept(q, k, config, grid)
    assert not kept.all()
    o = nabla_attention(q, k, v, config, grid, backend="reference")
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, kept), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_is_within_budget(dtype):
    grid, config = Grid(2, 9, 11), CONFIGS[0]
    inputs, do = draw(grid, dtype)
    actual = results(attend(config, grid, "torch"), [strided(x) for x in inputs], do)
    kept = tokens_kept(*(x.double() for x in inputs[:2]), config, grid)
    assert_kept_within_budget(actual, inputs, do, attend(config, grid, "reference"), kept, torch.float32)


def test_gradcheck():
    inputs = make_qkv((1, 2, 60, 2), requires_grad=True)
    assert gradcheck(attend(CONFIGS[0], Grid(3, 2, 10), "torch"), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [NablaConfig(top_p=1.0, sliding_tile="none"), NablaConfig(top_p=0.1)], ids=str)
def test_all_patches_kept_is_dense_attention(config, backend):
    """By the whole map, or by a sliding tile that covers the grid."""
    grid = Grid(3, 9, 11)
    inputs, do = draw(grid)
    expected = results(F.scaled_dot_product_attention, inputs, do)
    for a, e in zip(results(attend(config, grid, backend), inputs, do), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", ["1x1x1", "3x1x3", "2x5x1", "none"])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_share_of_the_sliding_tile(grid, tile):
    """Its pairs, counted by patches along each side, are those of its mask; even ends count like the odd ones above."""
    config = NablaConfig(sliding_tile=tile)
    patches = patches_of(grid, config.reach, CPU)
    near = torch.zeros(len(patches.order.counts)) if patches.near is None else patches.near.double()
    counts = patches.order.counts.double()
    assert tile_share(config, grid) == pytest.approx(((near * counts).sum(-1) * counts).sum() / grid.num_tokens**2)
    largest = 0.4 + counts.max().item() / grid.num_tokens + tile_share(config, grid)
    assert density_bound(config, grid) == pytest.approx(min(1, largest))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_p": 0}, "top_p is 0, but must be a number above 0 and at most 1. Try --top-p 0.4."),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"sliding_tile": "11x3"}, "sliding_tile is '11x3', but must be three numbers of at least 1, or none"),
        ({"sliding_tile": "0x3x3"}, "sliding_tile is '0x3x3'"),
        ({"sliding_tile": 3}, "sliding_tile is 3"),
    ],
)
def test_what_is_out_of_range(fields, said):
    with pytest.raises(UsageError, match=said):
        NablaConfig(**fields)


@pytest.mark.parametrize(
    ("grid", "options", "said"),
    [
        (None, {}, "the grid of the 48 tokens is unknown"),
        (Grid(4, 3, 5), {}, "4 x 3 x 5 has 60 tokens, but the sequence has 48"),
        (patches_of(Grid(4, 3, 5), None, CPU), {}, "the grid of patches has 60 tokens, but q has 48"),
        (Grid(4, 3, 4), {"backend": "triton"}, "backend is 'triton', but must be one of auto, reference, torch"),
    ],
)
def test_what_it_does_not_take(grid, options, said):
    with pytest.raises(ValueError, match=said):
        nabla_attention(*make_qkv((1, 1, 48, 4)), NablaConfig(), grid, **options)


def test_a_row_keeps_a_patch_however_small_the_share():
    """1 - top_p is 1 there in floating point, and a row's weights may sum to less."""
    grid, config = Grid(5, 24, 24), NablaConfig(top_p=1e-20, sliding_tile="none")
    q, k, _ = make_qkv((1, 8, grid.num_tokens, 16), torch.float32)
    kept = kept_patches(q, k, config, patches_of(grid, None, CPU), 0.25)
    assert (kept.sum(-1) == 1).all()


@pytest.mark.parametrize("top_p", [0.3, 0.55])
def test_an_even_map_keeps_the_bound_but_for_less_than_a_patch(top_p):
    grid, config = Grid(2, 16, 24), NablaConfig(top_p=top_p, sliding_tile="none")
    q = torch.zeros(1, 1, grid.num_tokens, 4)
    share = kept_patches(q, q, config, patches_of(grid, None, CPU), 0.5).double().mean().item()
    assert top_p <= share <= density_bound(config, grid) <= share + 1 / 12
