"""Energy and power of a window, from a made-up NVML whose answers are known."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from bench.measure import nvml
from bench.measure.contest import Contestant, Result, Window, contest
from bench.throughput import summary


class NvmlError(Exception):
    """What pynvml raises for everything."""


class FakeNvml:
    """A GPU at 200, 300, 400, ... W whose counter advances by 45 J per look."""

    NVMLError = NvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, missing: tuple[str, ...] = ()) -> None:
        self.missing, self.power_mw, self.energy_mj = missing, 100_000, 10_000
        self.asked_for = ""

    def _must_have(self, name: str) -> None:
        if name in self.missing:
            raise NvmlError(name)

    def nvmlInit(self) -> None:
        self._must_have("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked_for = uuid
        return "gpu"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._must_have("power")
        self.power_mw += 100_000
        return self.power_mw

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._must_have("energy")
        self.energy_mj += 45_000
        return self.energy_mj

    def nvmlDeviceGetClockInfo(self, handle: str, domain: int) -> int:
        return {1: 1700, 2: 2600}[domain]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._must_have("utilization")
        return SimpleNamespace(gpu=80, memory=30)


def window(meter: nvml.Meter) -> Window:
    """2 s and 10 steps with two samples."""
    meter.begin()
    meter.sample()
    return Window(10, 2.0, 1.0, 0.0, gpu=meter.end())


def row(fake: FakeNvml) -> dict[str, Any]:
    """Two windows of ten steps of 100 images each."""
    meter = nvml.Meter(fake, "gpu")
    return summary(Result([window(meter), window(meter)], {}), 100)


def test_energy_is_the_difference_of_the_counter_over_the_windows() -> None:
    found = row(FakeNvml())
    # 45 J per window, 90 J for 2000 images: 45 kJ, that is 0.0125 kWh, per million.
    assert found["kwh_per_million_images"] == pytest.approx(0.0125)
    assert found["energy_from"] == "counter"
    assert found["power_w"] == 350  # mean of 200, 300, 400, 500
    assert (found["sm_clock_mhz"], found["memory_clock_mhz"]) == (1700, 2600)
    assert found["gpu_utilization_percent"] == 80


def test_energy_without_a_counter_is_power_times_seconds() -> None:
    found = row(FakeNvml(missing=("energy", "utilization")))
    # 350 W for 4 s are 1400 J for 2000 images: 0.1944 kWh per million.
    assert found["kwh_per_million_images"] == pytest.approx(0.1944)
    assert found["energy_from"] == "sampled power"
    assert "gpu_utilization_percent" not in found


def test_a_gpu_that_reports_no_power_has_no_energy_in_its_row() -> None:
    found = row(FakeNvml(missing=("energy", "power")))
    assert not {"power_w", "energy_from", "kwh_per_million_images"} & set(found)
    assert found["sm_clock_mhz"] == 1700


class Witness(FakeNvml):
    """Leaves a file `windows/N` once it was read three times in window N."""

    def __init__(self, windows: Path) -> None:
        super().__init__()
        self.windows, self.looks, self.energies = windows, 0, 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.energies, self.looks = self.energies + 1, 0  # asked at the begin and at the end
        return super().nvmlDeviceGetTotalEnergyConsumption(handle)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self.looks += 1
        if self.looks == 3:
            (self.windows / str(self.energies // 2)).touch()
        return super().nvmlDeviceGetPowerUsage(handle)


def test_meter_reads_while_a_contestant_works(tmp_path: Path) -> None:
    meter = nvml.Meter(Witness(tmp_path), "gpu")
    worker = Contestant("w", "tests.bench.measure.test_nvml:Worker", {"windows": str(tmp_path)})
    first, second = contest([worker], windows=2, steps=1, warmup=0, meter=meter)["w"].windows
    for each in (first, second):
        assert each.gpu is not None
        assert each.gpu.counted_j == pytest.approx(45)
        assert len(each.gpu.samples) > 3  # three while it worked, and one at the end


class Worker:
    """A machine that works until it was looked at often enough: window N until `windows/N`."""

    device, wait_s = torch.device("cpu"), 0.0

    def __init__(self, windows: str) -> None:
        self.windows, self.done = Path(windows), 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            while not (self.windows / str(self.done)).exists():
                time.sleep(0.01)
            self.done += 1

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def test_meter_finds_the_device_by_its_uuid_and_tells_its_absence_once() -> None:
    said: list[str] = []
    assert nvml.build_meter(torch.device("cpu"), said.append) is None
    assert said == []
    known = mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(uuid="ab"))
    fake = FakeNvml()
    with known, mock.patch.dict(sys.modules, {"pynvml": fake}):
        assert nvml.build_meter(torch.device("cuda", 3), said.append) is not None
    assert fake.asked_for == "GPU-ab"
    assert said == []
    with known, mock.patch.dict(sys.modules, {"pynvml": None}):
        assert nvml.build_meter(torch.device("cuda"), said.append) is None
    assert len(said) == 1
    assert "nvidia-ml-py" in said[0]
