"""The schedules of least error for their cost, of squared errors that add up over the layers. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Choices = tuple[int, ...]  # of each layer, in each part of the steps, the number of a candidate

LEVELS = 96  # of cost, between the cheapest schedule and the dearest


def best_choices(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> list[Choices]:
    """Of errors that add up over the layers, the choices that none is better than for its cost, the cheapest first.

    They are the corners of the lower convex hull, which are exact, and what a knapsack in LEVELS steps of cost finds
    between these.

    Args:
        costs, errors: of each layer (in each part of the steps), those of each candidate; errors may be negative.
    """
    found = list[tuple[float, float, Choices]]()
    for choices in (*_on_hull(costs, errors), *_in_knapsack(costs, errors)):
        found.append((_total(choices, costs), _total(choices, errors), choices))
    best = list[Choices]()
    least = float("inf")
    for _, error, choices in sorted(found):
        if error < least:
            least = error
            best.append(choices)
    return best


def _total(choices: Choices, values: Sequence[Sequence[float]]) -> float:
    return sum(own[choice] for own, choice in zip(values, choices, strict=True))


def _in_knapsack(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> list[Choices]:
    """For each of LEVELS budgets the choices of least error, with costs rounded to the nearest level."""
    least = [min(own) for own in costs]
    unit = sum(max(own) for own in costs) - sum(least)
    if unit <= 0:
        return []
    weights = [[round(LEVELS * (cost - low) / unit) for cost in own] for own, low in zip(costs, least, strict=True)]
    totals, taken = [0.0] * (LEVELS + 1), list[list[int]]()
    for own, wrong in zip(weights, errors, strict=True):
        options = [
            min((totals[level - weight] + wrong[index], index) for index, weight in enumerate(own) if weight <= level)
            for level in range(LEVELS + 1)
        ]
        totals = [total for total, _ in options]
        taken.append([index for _, index in options])
    found = []
    for level in range(LEVELS + 1):
        rest, choices = level, list[int]()
        for own, chosen in zip(reversed(weights), reversed(taken), strict=True):
            choices.append(chosen[rest])
            rest -= own[chosen[rest]]
        found.append(tuple(reversed(choices)))
    return found


def _on_hull(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> list[Choices]:
    """The minima of error + rate * cost for every rate >= 0: each layer's candidates are reduced to their lower convex
    hull, and the steps along these are taken in the order of what they gain."""
    hulls = [_hull(own, wrong) for own, wrong in zip(costs, errors, strict=True)]
    moves = [
        (_slope(costs[item], errors[item], before, after), item, number)
        for item, hull in enumerate(hulls)
        for number, (before, after) in enumerate(zip(hull, hull[1:], strict=False), 1)
    ]
    chosen = [hull[0] for hull in hulls]
    found = [tuple(chosen)]
    for _, item, number in sorted(moves):
        chosen[item] = hulls[item][number]
        found.append(tuple(chosen))
    return found


def _hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The candidates on the lower convex hull of error over cost, from the cheapest to that of least error."""
    hull = list[int]()
    for each in sorted(range(len(costs)), key=lambda index: (costs[index], errors[index])):
        if hull and errors[each] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(costs, errors, hull[-2], hull[-1]) >= _slope(costs, errors, hull[-2], each):
            hull.pop()
        hull.append(each)
    return hull


def _slope(costs: Sequence[float], errors: Sequence[float], before: int, after: int) -> float:
    return (errors[after] - errors[before]) / (costs[after] - costs[before])


def cheapest_within(count: int, error_of: Callable[[int], float], bound: float) -> int | None:
    """By bisection, the first of `count` schedules, the cheapest first, whose measured error is within a bound.

    Errors fall as costs rise, as predicted; None where not even the last one's is.
    """
    if error_of(count - 1) > bound:
        return None
    low, high = 0, count - 1  # the answer lies in low..high, and that at high is within the bound
    while low < high:
        middle = (low + high) // 2
        if error_of(middle) <= bound:
            high = middle
        else:
            low = middle + 1
    return high
