"""The schedules of least error for their cost, of squared errors that add up: the lower convex hull. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Choices = tuple[int, ...]  # of each layer, in each part of the steps, the number of a candidate


def best_choices(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> list[Choices]:
    """The choices that no other is better than at any exchange rate of error for cost, the cheapest first.

    With errors that add up over the layers, these are the minima of error + rate * cost for every rate >= 0: each
    layer's candidates are reduced to their lower convex hull, and its steps are taken in the order of what they gain.

    Args:
        costs, errors: of each layer (in each part of the steps), those of each candidate; errors may be negative.
    """
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
