import dataclasses
import itertools
import math

import pytest

from slagen.attention.sla.config import SLAConfig
from slagen.errors import EnvironmentProblem, GateError, SlagenError, UsageError, WeightsError
from slagen.wan.defaults import ModelDefaults


def test_exit_codes_are_those_documented():
    kinds = [SlagenError, UsageError, EnvironmentProblem, WeightsError, GateError]
    assert [kind.exit_code for kind in kinds] == [1, 2, 4, 5, 6]
    assert all(issubclass(kind, SlagenError) and str(kind("what to type")) == "what to type" for kind in kinds)


def test_defaults_are_the_published_ones():
    assert SLAConfig() == SLAConfig(
        sparsity=0.95, negligible=0.0, linear_domain="all", feature_map="softmax", block_m=64, block_n=64
    )


def test_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SLAConfig().sparsity = 0.5
    assert len({SLAConfig(), SLAConfig(), SLAConfig(sparsity=0.5)}) == 2


@pytest.mark.parametrize("field", ["sparsity", "negligible"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 95, math.nan, math.inf, "0.5", None, True, 1j], ids=repr)
def test_fraction_out_of_range_is_refused(field, value):
    with pytest.raises(UsageError, match=field) as caught:
        SLAConfig(**{"linear_domain": "marginal", field: value})
    assert repr(value) in caught.value.message and "Try" in caught.value.message


@pytest.mark.parametrize(
    "field, value",
    [
        ("linear_domain", "some"),
        ("linear_domain", None),
        ("feature_map", "hedgehog"),
        ("block_m", 0),
        ("block_m", 48),
        ("block_m", 64.0),
        ("block_n", 256),
        ("block_n", True),
        ("block_n", "64"),
    ],
    ids=str,
)
def test_value_that_is_no_choice_is_refused(field, value):
    with pytest.raises(UsageError, match=field) as caught:
        SLAConfig(**{field: value})
    assert repr(value) in caught.value.message and "Try" in caught.value.message


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_block_size_works(size):
    assert SLAConfig(block_m=size, block_n=size).num_blocks(size + 1) == (2, 2)


def test_negligible_blocks_need_the_marginal_domain():
    with pytest.raises(UsageError, match="marginal"):
        SLAConfig(negligible=0.1)
    assert SLAConfig(negligible=0.1, linear_domain="marginal").num_negligible(20) == 2


def test_blocks_cover_the_tokens():
    config = SLAConfig(block_m=128, block_n=64)
    assert [config.num_blocks(length) for length in (1, 64, 65, 128, 129, 32760)] == [
        (1, 1),
        (1, 1),
        (1, 2),
        (1, 2),
        (2, 3),
        (256, 512),
    ]


@pytest.mark.parametrize(
    "sparsity, num_key_blocks, critical",
    [
        (0.95, 512, 25),
        (0.9, 512, 51),
        (0.95, 80, 4),
        (0.95, 20, 1),
        (0.95, 3, 1),
        (0.999, 1, 1),
        (0, 7, 7),
        (0.5, 7, 3),
    ],
)
def test_critical_blocks_are_floored_but_at_least_one(sparsity, num_key_blocks, critical):
    assert SLAConfig(sparsity=sparsity).num_critical(num_key_blocks) == critical


def test_rounding_errors_lose_no_block():
    """1 - 0.95 is 0.05000000000000004, but 1 - 0.9 is 0.09999999999999998: of 10 blocks one must stay."""
    for percent in (5, 10, 15, 20, 30, 70):
        config = SLAConfig(sparsity=1 - percent / 100)
        for num_key_blocks in range(1, 1200):
            assert config.num_critical(num_key_blocks) == max(1, percent * num_key_blocks // 100)


def test_classes_add_up_and_critical_wins():
    for sparsity, negligible, num_key_blocks in itertools.product(
        (0, 0.3, 0.95), (0, 0.1, 0.5, 0.99), (1, 2, 3, 20, 512)
    ):
        config = SLAConfig(sparsity=sparsity, negligible=negligible, linear_domain="marginal")
        critical, dropped = config.num_critical(num_key_blocks), config.num_negligible(num_key_blocks)
        assert 1 <= critical <= num_key_blocks
        assert dropped == min(num_key_blocks - critical, int(negligible * num_key_blocks + 1e-6))
        assert critical + dropped + config.num_marginal(num_key_blocks) == num_key_blocks


def test_dict_round_trip():
    config = SLAConfig(
        sparsity=0.9, negligible=0.1, linear_domain="marginal", feature_map="elu", block_m=128, block_n=32
    )
    assert SLAConfig.from_dict(config.to_dict()) == config


def test_dict_with_other_fields_is_refused():
    fields = SLAConfig().to_dict()
    with pytest.raises(UsageError, match="unknown setting topk"):
        SLAConfig.from_dict(fields | {"topk": 3})
    del fields["block_n"]
    with pytest.raises(UsageError, match="lack block_n"):
        SLAConfig.from_dict(fields)


def test_trained_sizes_are_read_and_the_nearest_is_named():
    sizes = [dict(width=128, height=128, num_frames=17), dict(width=256, height=256, num_frames=33)]
    defaults = ModelDefaults.from_dict({"trained_sizes": sizes})
    assert ModelDefaults().size_warning("wan", 16, 16, 1) is None
    assert all(defaults.size_warning("tiny", **size) is None for size in sizes)
    for size, nearest in (((160, 160, 17), "128x128 --num-frames 17"), ((224, 256, 65), "256x256 --num-frames 33")):
        text = defaults.size_warning("tiny", *size)
        assert text.startswith("tiny was trained only at 128x128 with 17 frames, 256x256 with 33 frames")
        assert text.endswith(f"Try --size {nearest}")


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        {"width": 128},
        ["128x128"],
        [{"width": 128, "height": 128}],
        [{"width": 128, "height": 128, "num_frames": 0}],
        [{"width": 128.0, "height": 128, "num_frames": 17}],
        [{"width": 128, "height": 128, "num_frames": 17, "fps": 8}],
    ],
    ids=str,
)
def test_trained_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(UsageError, match="trained_sizes"):
        ModelDefaults.from_dict({"trained_sizes": sizes})


def test_a_top_k_is_counted_as_in_the_published_code():
    """int(r * K), in floating point, and at least 1; whatever sparsity the settings then hold, it counts the same."""
    config = SLAConfig(negligible=0.1, linear_domain="marginal", block_m=16)
    for hundredths in range(1, 101):
        for blocks in (1, 7, 20, 50, 90, 100, 180, 511, 512, 592, 1182):
            topk = hundredths / 100
            made = config.with_topk(topk, blocks)
            assert made.num_critical(blocks) == max(1, int(topk * blocks))
            assert made == dataclasses.replace(config, sparsity=made.sparsity)
    assert config.with_topk(0.29, 100).sparsity == 0.72 and config.with_topk(0.29, 99).sparsity == 0.71


def test_the_released_weights_count_the_same_either_way():
    """TurboDiffusion's default is a top-k of 0.1, which our presets say as a sparsity of 0.9."""
    config = SLAConfig(sparsity=0.9)
    assert all(config.num_critical(blocks) == max(1, int(0.1 * blocks)) for blocks in range(1, 20_001))
    assert [config.num_critical(blocks) for blocks in (511, 512, 592, 1182)] == [51, 51, 59, 118]
