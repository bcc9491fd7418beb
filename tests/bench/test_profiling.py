"""Every millisecond of a profile belongs to one part, and the phases have their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.profiling import (
    DATA,
    PHASES,
    launches,
    part_of,
    profile_step,
    ranged_batches,
    shares,
    with_ranges,
)
from bench.steps.contestants import fed_step
from fastmoco.config import dump, parse
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.step import Step
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from fastmoco_kernels.network import batch_norm_cpu

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]
CPU = torch.profiler.ProfilerActivity.CPU


def test_profile_names_the_phases_and_shares_out_all_time() -> None:
    step, machine = fed_step(dump(parse(TINY)), ranged_batches)
    run = with_ranges(step, machine.step)
    with torch.profiler.profile(activities=[CPU]) as profiler:
        run()
    events = list(profiler.events() or [])
    assert {DATA, *PHASES} <= {event.name for event in events}
    found = shares(events, cuda=False)
    assert sum(found.values()) == pytest.approx(100)
    assert {"convolution", "batch norm", "loss", "update", "data"} <= set(found)


def test_profile_leaves_trace_and_table(tmp_path: Path) -> None:
    row = profile_step(parse(TINY), tmp_path / "profile", 2)
    assert row["steps"] == 2
    assert row["step_ms"] > 0
    assert sum(row["shares"].values()) == pytest.approx(100, abs=0.1)
    assert '"traceEvents"' in (tmp_path / "profile" / "trace.json").read_text()
    assert "convolution" in (tmp_path / "profile" / "operations.txt").read_text()
    assert "function calls" in (tmp_path / "profile" / "host.txt").read_text()


def slow(batches: Iterator[Batch]) -> Iterator[Batch]:
    """A loader that uses the processor before every batch."""
    for batch in batches:
        for _ in range(20):
            torch.rand(50_000).sort()
        yield batch


def test_a_slow_loader_is_seen_as_data() -> None:
    step, machine = fed_step(dump(parse(TINY)), lambda batches: ranged_batches(slow(batches)))
    run = with_ranges(step, machine.step)
    with torch.profiler.profile(activities=[CPU]) as profiler:
        run()
    events = list(profiler.events() or [])
    sorts = [event for event in events if event.name == "aten::sort"]
    assert len(sorts) >= 20
    assert {part_of(event) for event in sorts} == {"data"}
    everything = sum(event.self_cpu_time_total for event in events)
    least = 100 * sum(event.self_cpu_time_total for event in sorts) / everything
    assert 0 < least <= shares(events, cuda=False)["data"] < 100


def test_a_step_that_is_one_graph_has_one_range() -> None:
    step, _ = fed_step(dump(parse(TINY)))
    parts: dict[str, Any] = {f.name: getattr(step, f.name) for f in fields(Step)}
    world = World(0, 0, 1, torch.device("cpu"), "none")
    whole = WholeStep(**parts, world=world, backend="eager")
    images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    views = Batch(images, images)
    run = with_ranges(whole, lambda: whole([views], 0))
    with torch.profiler.profile(activities=[CPU]) as profiler:
        run()
    names = [event.name for event in profiler.events() or []]
    assert names.count("fastmoco.graph") == 1


def test_launches_of_runtime_and_driver_are_counted() -> None:
    calls = {
        *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch"),
        *("cudaMemcpyAsync", "cudaStreamSynchronize", "aten::convolution"),
    }
    assert launches([SimpleNamespace(key=name, count=3) for name in calls]) == 4 * 3


def event(
    name: str,
    parent: Any = None,
    device_us: float = 0,
    device: str = "CPU",
    mark: bool = False,
    host_us: float = 1e9,  # not to be counted on CUDA
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_device_time_total=device_us,
        self_cpu_time_total=host_us,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=mark,
    )


def test_time_on_the_device_is_counted_once_and_belongs_to_whoever_launched_it() -> None:
    update = event("fastmoco.update")
    kernel = "triton_red_fused__native_batch_norm_legit_functional_convolution_backward_relu_7"
    events = [
        update,
        event("aten::mul_", update, 10),
        event("aten::cudnn_convolution", None, 50),
        event(kernel, None, 20),  # the range that Inductor puts around its launch
        event("aten::relu_", None, 10),
        # The same kernels as the device sees them, one that nobody is known to have launched, and
        # a range, which is no work.
        event("sm90_xmma_fprop", None, 50, "CUDA"),
        event(kernel, None, 20, "CUDA"),
        event("vectorized_elementwise_kernel", None, 20, "CUDA"),
        event("graph_replayed_kernel", None, 10, "CUDA"),
        event("fastmoco.update", None, 500, "CUDA", mark=True),
    ]
    assert shares(events, cuda=True) == pytest.approx(
        {
            "convolution": 50,
            "batch norm": 20,
            "update": 10,
            "elementwise and copies": 10,
            "unknown": 10,
        }
    )


def test_time_of_the_host_belongs_to_the_nearest_name_and_the_largest_part_comes_first() -> None:
    data, backward = event(DATA, host_us=1), event("autograd::engine", host_us=4)
    convolution = event("aten::convolution", data, host_us=2)
    events = [
        *(data, backward, convolution),
        event("aten::copy_", convolution, host_us=3),
        event("aten::mkldnn_convolution", None, host_us=60),
        event("aten::sort", data, host_us=9),
        event("aten::native_batch_norm", backward, host_us=21),
    ]
    found = shares(events, cuda=False)
    assert found == pytest.approx(
        {"convolution": 65, "batch norm": 21, "data": 10, "elementwise and copies": 4}
    )
    assert list(found) == ["convolution", "batch norm", "data", "elementwise and copies"]


def test_our_kernels_of_the_cpu_belong_to_their_layers() -> None:
    """Autograd records the names of these classes, forward and with `Backward` behind."""
    parts = {
        batch_norm_cpu._BatchNormAct: "batch norm",
        convolution_cpu._Convolution: "convolution",
        convolution_fp32_cpu._Convolution: "convolution",
    }
    for function, part in parts.items():
        assert part_of(event(function.__name__)) == part
        assert part_of(event(f"{function.__name__}Backward")) == part


@pytest.mark.gpu
def test_real_launches() -> None:
    x = torch.ones(8, device="cuda")
    activities = [CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        (x + 1).sum().item()
    assert launches(profiler.key_averages()) >= 2
