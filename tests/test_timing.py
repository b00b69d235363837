"""Timer: what it calls, how often, and what it counts."""

import pytest

from slagen import timing
from slagen.timing import TURNS, Timer


class Machine:
    """A clock that a call moves on, and a call whose spans are the numbers it is given."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def __call__(self, clock, given):
        self.calls.append(given)
        self.now += self.seconds
        clock.add("forward", 0.0, len(self.calls) / 1e3)


def test_turns_share_the_time(monkeypatch):
    machine = Machine(monkeypatch, 0.02)
    timer = Timer(machine, ["a", "b", "c"], "cpu", seconds=1.0)
    assert timer.warm_up() == pytest.approx(0.02)
    warm = len(machine.calls)
    assert warm - 1 >= 5  # a tenth of the time, after the first
    for _ in range(TURNS + 2):
        timer.turn()
    times = timer.times("forward")
    assert times.repeats == 50 and len(times.turn_medians) == TURNS
    assert len(machine.calls) == warm + TURNS * 11  # of 11 calls in a turn the first is not counted
    assert machine.calls[:4] == ["a", "b", "c", "a"]
    counted = [warm + 11 * turn + call for turn in range(TURNS) for call in range(2, 12)]
    assert times.median == pytest.approx((counted[24] + counted[25]) / 2)
    assert times.turn_medians[0] == pytest.approx(warm + 6.5)


@pytest.mark.parametrize(("seconds", "repeats"), [(10.0, 3), (1e-6, 100)], ids=["slow", "fast"])
def test_repeats_are_bounded(monkeypatch, seconds, repeats):
    timer = Timer(Machine(monkeypatch, seconds), [None], "cpu", seconds=1.0)
    timer.warm_up()
    for _ in range(TURNS):
        timer.turn()
    times = timer.times("forward")
    assert times.repeats == repeats and times.q1 <= times.median <= times.q3
