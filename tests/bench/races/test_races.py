"""The races of the kernels let nobody in who computes something else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice
from unittest import mock

import pytest
import torch

from bench.kernels import main, races, traffic
from bench.races import updates
from bench.races.convolutions import PARTS, convolution_race
from bench.races.crop_resize import crop_resize_race
from bench.races.layers import CUDA_NORMS, batch_norm_race, max_pool_race
from bench.races.loss import enqueue_race, loss_race
from bench.races.photometric import photometric_race
from bench.races.race import Outputs, Race, cold_copies, device_milliseconds, distance, run
from bench.races.updates import ema_race, sgd_ema_race
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from fastmoco_kernels.network import batch_norm_cpu
from tests.support.compiled import needs

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
as_it_is = mock.patch("torch.compile", lambda function=None, **_: function or (lambda f: f))
"""Compiling takes a minute."""


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.races.race.COLD_BYTES", 1)


def outputs_of(asked: Race, way: str) -> Outputs:
    return asked.ways[way](*asked.inputs)


def test_a_race_checks_its_ways_before_it_times_them() -> None:
    calls: list[int] = []

    def right() -> Outputs:
        calls.append(1)
        return [torch.tensor(1.5)]

    asked = Race("op", {}, {"right": right}, [torch.tensor(1.0)], 0.5)
    timing = run(asked, CPU, windows=7)["right"]
    assert timing["p20_ms"] <= timing["p50_ms"] <= timing["p80_ms"]
    assert (timing["n"], timing["error"], len(calls)) == (7, 0.5, 3 + 1 + 7)
    wrong = {"right": right, "wrong": lambda: [torch.tensor(float("nan"))]}
    with pytest.raises(ValueError, match="wrong: error nan"):
        run(replace(asked, ways=wrong), CPU)


@as_it_is
def test_all_ways_of_the_updates_move_parameters_and_averages() -> None:
    shapes = [torch.Size(sizes) for sizes in ([5, 3], [7], [2, 2, 3], [4])]
    with mock.patch.object(updates, "resnet50_shapes", return_value=shapes):
        alone, right, wrong = ema_race(CPU), sgd_ema_race(CPU), sgd_ema_race(CPU)
    assert len(run(alone, CPU, windows=1)) == 4
    assert len(run(right, CPU, windows=1)) == 3
    averages_stay = mock.patch("bench.races.updates.ema_")
    with averages_stay, pytest.raises(ValueError, match="foreach SGD, ema_: error"):
        run(wrong, CPU, windows=1)


def test_the_updates_are_those_of_the_network_of_the_recipe() -> None:
    shapes = updates.resnet50_shapes()
    assert shapes[0] == (64, 3, 7, 7)
    assert sum(shape.numel() for shape in shapes) == 27_966_656


def test_both_ways_of_the_enqueue_write_the_keys() -> None:
    asked = enqueue_race(4, 8, 16, CPU)
    assert len(run(asked, CPU, windows=1)) == 2
    assert distance([torch.zeros(4, 8)], asked.truth) > asked.allowed


@as_it_is
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_all_ways_of_the_loss_give_it_and_its_gradient(dtype: torch.dtype) -> None:
    asked = loss_race(32, 8, 64, dtype, CPU)
    assert list(run(asked, CPU, windows=1)) == ["official", "official compiled", "fastmoco"]
    loss, gradient = outputs_of(asked, "fastmoco")
    assert distance([loss * 1.1, gradient], asked.truth) > asked.allowed
    assert distance([loss, gradient * 1.1], asked.truth) > asked.allowed


@needs(convolution_fp32_cpu.reason())
@pytest.mark.parametrize("part", PARTS)
def test_each_way_of_a_part_of_a_layer_is_raced(part: str) -> None:
    asked = convolution_race(part, torch.float32, 2, 16, 6, 32, 3, 1)
    assert asked.case["part"] == part
    assert list(run(asked, CPU, windows=1)) == ["official", "direct", "winograd"]
    asked = convolution_race(part, torch.float32, 2, 16, 6, 32, 3, 2)
    assert list(run(asked, CPU, windows=1)) == ["official", "direct"]


@needs(batch_norm_cpu.reason())
@pytest.mark.parametrize("groups", [1, 2])
@as_it_is
def test_all_ways_of_batch_norm_move_gradients_and_running_statistics(groups: int) -> None:
    asked = batch_norm_race(4, 8, 3, True, groups, CPU)
    assert (asked.op, asked.case["residual"]) == ("batch_norm", True)
    assert len(run(asked, CPU, windows=1)) == 3
    outputs = outputs_of(asked, "fastmoco")
    assert [t.dtype for t in outputs] == [BF16, BF16, F32, F32, BF16]
    for at in range(len(outputs)):
        wrong = [t * 1.05 if i == at else t for i, t in enumerate(outputs)]
        assert distance(wrong, asked.truth) > asked.allowed


def test_on_cuda_the_batch_norm_of_groups_is_raced() -> None:
    built = races(torch.device("cuda"))["batch_norm"]
    assert [f.args[:5] for f in built if isinstance(f, partial)] == list(CUDA_NORMS)


@as_it_is
def test_all_ways_of_max_pooling_are_those_of_float64_and_have_a_rate() -> None:
    asked = max_pool_race(2, 8, 12, CPU)
    # bf16 (2, 8, 12, 12) and (2, 8, 6, 6), and a byte per output, in either direction.
    assert asked.case["least_bytes"] == 2 * (2 * 2304 + 2 * 576 + 576)
    assert list(run(asked, CPU, windows=1)) == ["official", "compiled", "fastmoco"]
    y, dx = outputs_of(asked, "official")
    assert distance([y, dx.roll(1, 3)], asked.truth) > asked.allowed
    assert traffic(200_000, 2.0, CPU) == {"gb_per_s": 0.1}
    assert "max_pool" in races(torch.device("cuda"))


def test_both_ways_of_the_views_are_the_references() -> None:
    asked = photometric_race(6, 16, CPU)
    assert asked.case["least_bytes"] == 2 * 6 * 16 * 16 * 3
    assert list(run(asked, CPU, windows=1)) == ["eager", "fastmoco"]
    (views,) = outputs_of(asked, "eager")
    assert distance([views], asked.truth) == 0
    assert distance([views + (views < 255)], asked.truth) > asked.allowed
    built = races(torch.device("cuda"))["photometric"]
    assert [f.args[:2] for f in built if isinstance(f, partial)] == [(512, 224), (64, 224)]


def test_both_ways_of_the_crops_are_the_references() -> None:
    asked = crop_resize_race(2, 16, CPU)
    assert asked.case["least_bytes"] > 4 * 16 * 16 * 3
    assert list(run(asked, CPU, windows=1)) == ["torch", "fastmoco"]
    (views,) = outputs_of(asked, "fastmoco")
    assert distance([views], asked.truth) == 0
    assert distance([views.roll(1, 2)], asked.truth) > asked.allowed
    assert "crop_resize" in races(torch.device("cuda"))


@needs(convolution_cpu.reason())
def test_weight_gradients_of_both_ways_are_those_of_float64() -> None:
    asked = convolution_race("weight gradient", torch.bfloat16, 2, 64, 5, 128, 3, 2)
    assert (asked.op, asked.case["side"], asked.case["stride"]) == ("weight_gradient", 5, 2)
    (official,), (fastmoco,) = (outputs_of(asked, way) for way in ("official", "fastmoco"))
    assert official.dtype == fastmoco.dtype == torch.float32
    assert official.shape == fastmoco.shape == (128, 64, 3, 3)
    timings = run(asked, CPU, windows=1)
    assert timings["fastmoco"]["error"] < 0.01 * timings["official"]["error"]  # not rounded to bf16
    skewed = fastmoco * torch.linspace(0.99, 1.01, 3)
    assert distance([skewed], asked.truth) > asked.allowed


def test_weight_gradients_are_raced_only_where_our_kernel_computes_them() -> None:
    with mock.patch("fastmoco_kernels.convolution.convolution_cpu.reason", return_value=""):
        assert "weight_gradient" in races(CPU)
        assert "weight_gradient" not in races(torch.device("cuda"))
    with mock.patch(
        "fastmoco_kernels.convolution.convolution_cpu.reason", return_value="no such unit"
    ):
        assert "weight_gradient" not in races(CPU)
        assert main(["--device", "cpu", "--only", "weight_gradient"]) == 2


def test_copies_are_equal_and_more_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.arange(6.0), torch.ones(2)
    monkeypatch.setattr("bench.races.race.COLD_BYTES", 3 * (x.nbytes + dy.nbytes))
    turns = list(islice(cold_copies([x, dy]), 4))
    assert all(torch.equal(a, x) and torch.equal(b, dy) for a, b in turns)
    assert len({a.data_ptr() for a, _ in turns}) == len({b.data_ptr() for _, b in turns}) == 3


@pytest.mark.gpu
def test_the_time_on_a_device_is_that_of_its_kernels() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    once = device_milliseconds(lambda: [x @ x for _ in range(2)])
    twice = device_milliseconds(lambda: [x @ x for _ in range(4)])
    assert once > 0
    assert 1.5 < twice / once < 2.5
