"""What the rows of a benchmark hold: rounded percentiles, interpolated as NumPy does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.measure.contest import Result, Window
from bench.measure.harness import Contender, percentiles, race, spread
from bench.throughput import ratios_of, summary


@pytest.mark.parametrize("n", [1, 2, 6, 11])
def test_percentiles_are_those_of_numpy(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n).tolist()
    expected = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    assert percentiles(values, 12) == pytest.approx(expected, abs=1e-12)
    assert percentiles(values) == [round(value, 4) for value in percentiles(values, 12)]
    found = spread(values, 2)
    assert list(found) == ["p20", "p50", "p80", "n"]
    assert list(found.values()) == [*percentiles(values, 2), n]


def test_a_row_of_throughput_has_speeds_and_turn_by_turn_ratios() -> None:
    ours = Result([Window(2, seconds, 1.0, 0.0) for seconds in (1.0, 2.0, 4.0)], {})
    theirs = Result([Window(1, seconds, 1.0, 0.0) for seconds in (2.0, 2.0, 3.0)], {})
    ratios = ratios_of({"step": ours, "official": theirs})
    assert ratios == {"our step / published step": [1.7, 2.0, 3.2]}  # of 4, 2 and 1.5
    row = summary(ours, 8)  # 16, 8 and 4 images per second
    assert [row[f"p{p}_images_per_second"] for p in (20, 50, 80)] == [5.6, 8.0, 12.8]


def test_a_race_checks_its_contenders_before_it_times_them() -> None:
    cpu, calls = torch.device("cpu"), []
    right = Contender("right", lambda: calls.append(1), lambda _: 0.5, 0.5)
    timing = race([right], cpu, rounds=7, warmup=2)["right"]
    assert timing.p20_ms <= timing.p50_ms <= timing.p80_ms
    assert (timing.n, timing.error, len(calls)) == (7, 0.5, 2 + 1 + 7)
    wrong = Contender("wrong", lambda: None, lambda _: float("nan"), 0.5)
    with pytest.raises(ValueError, match="wrong: error nan"):
        race([right, wrong], cpu)
