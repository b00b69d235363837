"""Records read from documents: what their form demands, and what comes of it."""

from dataclasses import dataclass, field

import pytest

from slagen.io import forms
from slagen.io.records import form_of, read_record


@dataclass(frozen=True)
class Row:
    step: int
    time_ms: float | None = None


@dataclass(frozen=True)
class Table:
    name: str
    rows: list[Row]
    by_name: dict[str, Row]
    extra: list[str] = field(default_factory=list)


CONTENT = {"name": "x", "rows": [{"step": 1, "time_ms": 2.5}, {"step": 2}], "by_name": {"a": {"step": 3, "time_ms": 4}}}
READ = Table("x", [Row(1, 2.5), Row(2)], {"a": Row(3, 4)})


def test_a_record_is_read():
    forms.check(CONTENT, form_of(Table))
    assert read_record(Table, CONTENT) == READ
    assert read_record(Table, {**CONTENT, "extra": ["y"], "unknown": 1}).extra == ["y"]
    assert read_record(Table, {**CONTENT, "rows": READ.rows}).rows == READ.rows  # which are read already


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"name": 1}, '"name" is a number, but must be text'),
        ({"rows": {}}, '"rows" is an object, but must be a list'),
        ({"rows": [{}]}, r'"rows\[0\]" has no "step"'),
        ({"rows": [{"step": 1, "time_ms": "x"}]}, r'"rows\[0\].time_ms" is text, but must be a number or null'),
        ({"by_name": {"a": {"step": "x"}}}, '"by_name.a.step" is text'),
        ({"extra": [1]}, r'"extra\[0\]" is a number'),
    ],
)
def test_what_has_another_form_is_refused(change, fault):
    with pytest.raises(forms.Fault, match=fault):
        forms.check({**CONTENT, **change}, form_of(Table))
