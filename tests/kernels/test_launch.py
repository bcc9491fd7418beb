"""A launch goes to the device on which its tensors lie."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco_kernels.launch import Launch


class Kernel:
    """Notes which device is the current one when it is launched."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.ran_on = current, -1

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        return self

    def __call__(self, **arguments: Any) -> None:
        self.ran_on = self.current[0]


def test_a_launch_runs_on_the_device_of_its_tensors_and_gives_the_current_one_back() -> None:
    current = [0]

    def exchange(device: int) -> int:
        before = current[0]
        if device >= 0:
            current[0] = device
        return before

    kernel = Kernel(current)
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda._exchange_device", exchange),
        mock.patch("torch.cuda._maybe_exchange_device", exchange),
    ):
        x = torch.empty(3, device="cuda:1")
        Launch(kernel, (1,), {"n": 3, "absent": None, "x": x}, 4).run()
    assert kernel.ran_on == 1
    assert current == [0]


def test_on_the_cpu_no_device_is_asked_for() -> None:
    kernel = Kernel([0])
    Launch(kernel, (1,), {"x": torch.empty(3)}, 4).run()
    assert kernel.ran_on == 0
