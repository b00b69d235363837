"""The search: for every cost the least sum of errors on the hull, and bisection on what is measured."""

import itertools
import random

import pytest

from slagen.tuning.search import best_choices, cheapest_within


def drawn(seed, layers=4, candidates=4):
    """Costs that rise and errors of any kind, some of them equal, for each layer."""
    source = random.Random(seed)
    costs = [[source.choice((1, 2, 3, 5, 8)) for _ in range(candidates)] for _ in range(layers)]
    errors = [[source.choice((-1, 0, 0.5, 2, 4, 9)) for _ in range(candidates)] for _ in range(layers)]
    return costs, errors


def totals(choices, costs, errors):
    pairs = list(zip(choices, costs, errors, strict=True))
    return sum(own[index] for index, own, _ in pairs), sum(own[index] for index, _, own in pairs)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_is_better_at_any_exchange_rate(seed):
    costs, errors = drawn(seed)
    found = [totals(each, costs, errors) for each in best_choices(costs, errors)]
    every = [totals(each, costs, errors) for each in itertools.product(range(4), repeat=4)]
    assert found == sorted(found, key=lambda pair: pair[0])
    assert [error for _, error in found] == sorted((error for _, error in found), reverse=True)
    assert found[0] == min(every) and found[-1][1] == min(error for _, error in every)
    for rate in (0, 0.01, 0.3, 1, 4, 100):
        assert min(error + rate * cost for cost, error in found) == pytest.approx(
            min(error + rate * cost for cost, error in every)
        )


@pytest.mark.parametrize("seed", range(6))
def test_between_the_corners_too_it_is_the_best_for_its_cost(seed):
    """With costs that are whole levels of the knapsack, for every budget."""
    source = random.Random(seed)
    costs = [[0, 24, *source.choices((0, 4, 8, 12, 16, 20, 24), k=2)] for _ in range(4)]
    errors = [[source.uniform(-1, 9) for _ in range(4)] for _ in range(4)]
    found = [totals(each, costs, errors) for each in best_choices(costs, errors)]
    every = [totals(each, costs, errors) for each in itertools.product(range(4), repeat=4)]
    for budget in range(0, 97, 4):
        best = min(error for cost, error in every if cost <= budget)
        assert min(error for cost, error in found if cost <= budget) == pytest.approx(best)
    assert len(found) == len({cost for cost, _ in found})


def test_the_layer_that_matters_most_is_spared_first():
    """The second layer's error is four times as large: it leaves the cheapest candidate before the first does."""
    costs, errors = [[1, 2], [1, 2]], [[1, 0], [4, 0]]
    assert best_choices(costs, errors) == [(0, 0), (0, 1), (1, 1)]
    assert best_choices(costs, [[0, 1], [0, 0]]) == [(0, 0)]  # the cheapest is as good


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_bisection_finds_the_cheapest_within_the_bound(count):
    errors = [float(count - index) for index in range(count)]
    for bound in [0.5, *(each + 0.1 for each in errors), count + 1]:
        asked = []
        found = cheapest_within(count, lambda index: asked.append(index) or errors[index], bound)  # noqa: B023
        assert found == next((index for index in range(count) if errors[index] <= bound), None)
        assert len(asked) <= 2 + count.bit_length()
