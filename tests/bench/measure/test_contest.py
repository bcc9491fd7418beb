"""Turns, and what the rows of a benchmark hold."""

from __future__ import annotations

from functools import partial

from bench.measure.contest import Result, Window, in_turns
from bench.measure.rows import quantiles, spread
from bench.throughput import ratios_of


def test_quantiles_are_interpolated_between_measurements() -> None:
    assert quantiles([5.0]) == [5.0, 5.0, 5.0]
    assert quantiles([3.0, 1.0]) == [1.4, 2.0, 2.6]
    assert quantiles([1.0, 2.0, 3.0, 4.00009], 2) == [1.6, 2.5, 3.4]
    assert spread([3.0, 1.0]) == {"p20": 1.4, "p50": 2.0, "p80": 2.6, "n": 2}
    assert spread([3.0, 1.0], unit="ms") == {"p20_ms": 1.4, "p50_ms": 2.0, "p80_ms": 2.6, "n": 2}


def test_a_row_of_throughput_has_speeds_and_turn_by_turn_ratios() -> None:
    ours = Result([Window(2, seconds, 1.0, 0.0) for seconds in (1.0, 2.0, 4.0)], {})
    theirs = Result([Window(1, seconds, 1.0, 0.0) for seconds in (2.0, 2.0, 3.0)], {})
    ratios = ratios_of({"step": ours, "official": theirs})
    assert ratios == {"our step / published step": [1.7, 2.0, 3.2]}  # of 4, 2 and 1.5
    row = ours.row(8)  # 16, 8 and 4 images per second
    assert [row[f"p{p}_images_per_second"] for p in (20, 50, 80)] == [5.6, 8.0, 12.8]


def test_every_turn_begins_with_another_one() -> None:
    calls: list[str] = []
    work = {name: partial(calls.append, name) for name in "abc"}
    in_turns(work, 4)
    assert "".join(calls) == "abcbcacababc"
    assert in_turns({"a": lambda: 1}, 2) == {"a": [1, 1]}
