"""Energy and power of a window, from a made-up GPU whose answers are known."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench.measure.contest import Contestant, Result, Window, contest
from fastmoco.machine.gpu_meter import Sample, build_meter

CUDA = torch.device("cuda")
REPORTS = {"power_draw": [100_000, 200_000, 300_000, 600_000], "clock_rate": [1700] * 4}


@contextmanager
def gpu(**reports: list[int]) -> Iterator[None]:
    """torch.cuda reports these numbers one after another, and raises for what is not named."""
    names = ("power_draw", "clock_rate", "utilization")
    with (
        mock.patch.object(torch.cuda, names[0], side_effect=reports.get(names[0], RuntimeError)),
        mock.patch.object(torch.cuda, names[1], side_effect=reports.get(names[1], RuntimeError)),
        mock.patch.object(torch.cuda, names[2], side_effect=reports.get(names[2], RuntimeError)),
    ):
        yield


def row(**reports: list[int]) -> dict[str, Any]:
    """Two windows of 2 s and ten steps of 100 images each, read once and twice."""
    with gpu(**reports):
        meter = build_meter(CUDA, print)
        assert meter
        first, second = [meter()], [meter(), meter()]
    windows = [Window(10, 2.0, 1.0, 0.0, gpu=samples) for samples in (first, second)]
    return Result(windows, {}).row(100)


def test_energy_is_mean_power_times_seconds() -> None:
    found = row(**REPORTS)
    assert found["power_w"] == pytest.approx(1100 / 3, abs=0.05)  # the first was a trial
    assert found["sm_clock_mhz"] == 1700
    assert "gpu_utilization_percent" not in found
    assert found["energy_from"] == "sampled power"
    # 366.7 W for 4 s are 1467 J for 2000 images: 0.2037 kWh per million.
    assert found["kwh_per_million_images"] == pytest.approx(0.2037)


def test_a_gpu_that_reports_no_power_has_no_energy_in_its_row() -> None:
    found = row(clock_rate=[1700] * 4)
    assert not {"power_w", "energy_from", "kwh_per_million_images"} & set(found)
    assert found["sm_clock_mhz"] == 1700


def test_absence_is_told_once_and_the_cpu_has_no_meter() -> None:
    said: list[str] = []
    assert build_meter(torch.device("cpu"), said.append) is None
    assert said == []
    with gpu():
        assert build_meter(CUDA, said.append) is None
    assert len(said) == 1
    assert "RuntimeError" in said[0]


class Worker:
    """A machine that says `busy-N` in window N and works until there is a file `done-N`."""

    device, wait_s = torch.device("cpu"), 0.0

    def __init__(self, windows: str) -> None:
        self.windows, self.number = Path(windows), 0

    def run(self, steps: int) -> None:
        if not steps:  # the warm-up
            return
        (self.windows / f"busy-{self.number}").touch()
        while not (self.windows / f"done-{self.number}").exists():
            time.sleep(0.01)
        self.number += 1

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def test_meter_reads_while_a_contestant_works(tmp_path: Path) -> None:
    looks: Counter[int] = Counter()

    def meter() -> Sample:
        """Ends a window once it was read three times in it."""
        window = len(list(tmp_path.glob("busy-*"))) - 1
        looks[window] += 1
        if window >= 0 and looks[window] >= 3:
            (tmp_path / f"done-{window}").touch()
        return {"power_w": 1.0}

    worker = Contestant("w", "tests.bench.measure.test_nvml:Worker", {"windows": str(tmp_path)})
    windows = contest([worker], windows=2, steps=1, warmup=0, meter=meter)["w"].windows
    assert all(len(window.gpu) > 3 for window in windows)  # and once at the end
