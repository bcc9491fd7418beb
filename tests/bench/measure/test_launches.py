"""Launches and waits are counted from what the profiler records, here made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from bench.measure.launches import RANGE, count, launches_of
from bench.steps.contestants import Bench, bare_encoder, our_step
from fastmoco.config import dump, parse

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def event(
    name: str, start: float, end: float | None = None, device: str = "CPU"
) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=start + 1 if end is None else end)
    return SimpleNamespace(name=name, time_range=span, device_type=SimpleNamespace(name=device))


STEP = [
    event("cudaDeviceSynchronize", 0),  # the profiler's own, before and after
    event(RANGE, 10, 100),
    event("aten::convolution", 11, 20),
    event("cudaLaunchKernel", 12),
    event("cudaLaunchKernelExC", 14),
    event("cuLaunchKernelEx", 16),  # Triton
    event("cudaGraphLaunch", 18),
    event("cudaMemcpyAsync", 20),
    event("cudaStreamSynchronize", 22),  # .item()
    event("ampere_bf16_gemm", 15, 40, "CUDA"),
    event("cudaLaunchKernel", 90),  # from the thread of the backward
    event("cudaDeviceSynchronize", 101),
    event(RANGE, 12, 150, "CUDA"),  # the range as the device sees it
]


def test_calls_inside_the_step_are_counted_and_no_others() -> None:
    assert count(STEP) == {"kernel_launches": 5, "host_syncs": 1}


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        *(("cudaMemcpy", 1), ("cudaMemcpyAsync", 0), ("cuMemcpyDtoH_v2", 1)),
        *(("cuMemcpyHtoDAsync_v2", 0), ("cudaEventSynchronize", 1), ("cudaStreamWaitEvent", 0)),
    ],
)
def test_only_calls_that_wait_are_waits(call: str, waits: int) -> None:
    step = [event(RANGE, 10, 100), event("cudaLaunchKernel", 12), event(call, 20)]
    assert count(step)["host_syncs"] == waits


def test_a_profiler_that_sees_no_device_says_nothing() -> None:
    assert count([event(RANGE, 0, 9), event("aten::convolution", 1)]) == {}
    assert count([event("cudaLaunchKernel", 1)]) == {}


def test_on_the_cpu_a_row_has_no_launches() -> None:
    assert launches_of(lambda: None, torch.device("cpu")) == {}
    facts = Bench(torch.device("cpu"), lambda: torch.ones(2, 3) @ torch.ones(3, 4)).facts()
    assert facts == {"threads": torch.get_num_threads(), "gflop_per_step": 0.0}


def test_on_cuda_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.steps.contestants.launches_of", lambda step, device: count(STEP))
    facts = Bench(torch.device("cuda"), lambda: None).facts()
    assert (facts["kernel_launches"], facts["host_syncs"]) == (5, 1)


def test_events_of_the_real_profiler_have_what_is_read() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler, record_function(RANGE):
        torch.ones(2)
    events = list(profiler.events() or [])
    inside = next(e for e in events if e.name == "aten::ones").time_range.start
    assert count([*events, event("cudaLaunchKernel", inside)])["kernel_launches"] == 1


def test_a_compiled_step_runs_while_its_facts_are_taken() -> None:
    text = dump(parse([*TINY, "--run.compile", "on"]))
    assert our_step(text).compiled
    assert bare_encoder(text).compiled
    x = torch.ones(8)
    graph = torch.compile(lambda: (x + 1).sum(), fullgraph=True, backend="eager")
    facts = Bench(torch.device("cpu"), graph, compiled=True).facts()
    assert "gflop_per_step" not in facts


@pytest.mark.gpu
def test_real_launches() -> None:
    x = torch.ones(8, device="cuda")
    found = launches_of(lambda: (x + 1).sum().item(), torch.device("cuda"))
    assert found["kernel_launches"] >= 2
    assert found["host_syncs"] >= 1
