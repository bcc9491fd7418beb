"""The races of the kernels let nobody in who computes something else."""

from __future__ import annotations

from functools import partial
from itertools import islice
from unittest import mock

import pytest
import torch

from bench.kernels import main, races, traffic
from bench.measure.contest import race
from bench.races.crop_resize import crop_resize_race
from bench.races.layers import PARTS, convolution_race, in_turns
from bench.races.loss import enqueue_race
from bench.races.max_pool import max_pool_race
from bench.races.norm import CASES, group_batch_norm_race
from bench.races.photometric import photometric_race
from bench.races.updates import sgd_ema_race
from fastmoco_kernels import convolution_cpu, convolution_fp32_cpu
from tests.support.compiled import needs

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def test_all_ways_of_the_update_move_parameters_and_averages() -> None:
    shapes = [torch.Size(sizes) for sizes in ([5, 3], [7], [2, 2, 3], [4])]
    with mock.patch("bench.races.updates.resnet50_shapes", return_value=shapes):
        (_, _, right), (_, _, wrong) = sgd_ema_race(CPU), sgd_ema_race(CPU)
    assert len(race(right, CPU, windows=1)) == 3
    averages_stay = mock.patch("bench.races.updates.ema_")
    with averages_stay, pytest.raises(ValueError, match="foreach SGD, ema_: error"):
        race(wrong, CPU, windows=1)


def test_both_ways_of_the_enqueue_write_the_keys() -> None:
    _, _, ways = enqueue_race(4, 8, 16, CPU)
    assert len(race(ways, CPU, windows=1)) == 2
    assert ways[0].error(torch.zeros(16, 8)) > 0


@needs(convolution_fp32_cpu.reason())
@pytest.mark.parametrize("part", PARTS)
def test_each_way_of_a_part_of_a_layer_is_raced(part: str) -> None:
    _, case, ways = convolution_race(part, torch.float32, 2, 16, 6, 32, 3, 1)
    assert case["part"] == part
    assert list(race(ways, CPU, windows=1)) == ["official", "direct", "winograd"]
    _, _, ways = convolution_race(part, torch.float32, 2, 16, 6, 32, 3, 2)
    assert list(race(ways, CPU, windows=1)) == ["official", "direct"]


def test_all_ways_of_group_batch_norm_move_gradients_and_running_statistics() -> None:
    with mock.patch("torch.compile", return_value=lambda function: function):
        name, case, ways = group_batch_norm_race(4, 8, 3, True, 2, CPU)
    assert (name, case["groups"], case["residual"]) == ("batch_norm", 2, True)
    assert len(race(ways, CPU, windows=1)) == 3
    outputs = ways[2].run()
    assert [t.dtype for t in outputs] == [BF16, BF16, F32, F32, BF16]
    for at in range(len(outputs)):
        wrong = [t * 1.05 if i == at else t for i, t in enumerate(outputs)]
        assert ways[2].error(wrong) > ways[2].allowed


def test_on_cuda_the_batch_norm_of_groups_is_raced() -> None:
    built = races(torch.device("cuda"))["batch_norm"]
    assert [f.args[:5] for f in built if isinstance(f, partial)] == list(CASES)


def test_all_ways_of_max_pooling_are_those_of_float64_and_have_a_rate() -> None:
    with mock.patch("torch.compile", lambda function, **options: function):  # takes a minute
        _, case, ways = max_pool_race(2, 8, 12, CPU)
    # bf16 (2, 8, 12, 12) and (2, 8, 6, 6), and a byte per output, in either direction.
    assert case["least_bytes"] == 2 * (2 * 2304 + 2 * 576 + 576)
    timings = race(ways, CPU, windows=1)
    assert list(timings) == ["official", "compiled", "fastmoco"]
    y, dx = ways[0].run()
    assert all(way.error((y, dx.roll(1, 3))) > way.allowed for way in ways)
    assert traffic(200_000, 2.0, CPU) == {"gb_per_s": 0.1}
    assert "max_pool" in races(torch.device("cuda"))


def test_both_ways_of_the_views_are_the_references() -> None:
    with mock.patch("bench.races.layers.COLD_BYTES", 1):
        _, case, ways = photometric_race(6, 16, CPU)
    assert case["least_bytes"] == 2 * 6 * 16 * 16 * 3
    assert list(race(ways, CPU, windows=1)) == ["eager", "fastmoco"]
    views = ways[0].run()
    assert all(way.error(views) == 0 for way in ways)
    assert all(way.error(views + (views < 255)) > way.allowed for way in ways)
    built = races(torch.device("cuda"))["photometric"]
    assert [f.args[:2] for f in built if isinstance(f, partial)] == [(512, 224), (64, 224)]


def test_both_ways_of_the_crops_are_the_references() -> None:
    _, case, ways = crop_resize_race(2, 16, CPU)
    assert case["least_bytes"] > 4 * 16 * 16 * 3
    assert list(race(ways, CPU, windows=1)) == ["torch", "fastmoco"]
    views = ways[1].run()
    assert ways[1].error(views) == 0
    assert all(way.error(views.roll(1, 2)) > way.allowed for way in ways)
    assert "crop_resize" in races(torch.device("cuda"))


@needs(convolution_cpu.reason())
def test_weight_gradients_of_both_ways_are_those_of_float64() -> None:
    name, case, ways = convolution_race("weight gradient", torch.bfloat16, 2, 64, 5, 128, 3, 2)
    assert (name, case["side"], case["stride"]) == ("weight_gradient", 5, 2)
    official, fastmoco = (way.run() for way in ways)
    assert official.dtype == fastmoco.dtype == torch.float32
    assert official.shape == fastmoco.shape == (128, 64, 3, 3)
    timings = race(ways, CPU, windows=1)
    assert timings["fastmoco"]["error"] < 0.01 * timings["official"]["error"]  # not rounded to bf16
    skewed = fastmoco * torch.linspace(0.99, 1.01, 3)
    assert all(way.error(skewed) > way.allowed for way in ways)


def test_weight_gradients_are_raced_only_where_our_kernel_computes_them() -> None:
    with mock.patch("fastmoco_kernels.convolution_cpu.reason", return_value=""):
        assert "weight_gradient" in races(CPU)
        assert "weight_gradient" not in races(torch.device("cuda"))
    with mock.patch("fastmoco_kernels.convolution_cpu.reason", return_value="no such unit"):
        assert "weight_gradient" not in races(CPU)
        assert main(["--device", "cpu", "--only", "weight_gradient"]) == 2


def test_tensors_in_turns_are_equal_and_more_than_a_cache_holds() -> None:
    x, dy = torch.arange(6.0), torch.ones(2)
    with mock.patch("bench.races.layers.COLD_BYTES", 3 * x.nbytes):
        turns = list(islice(in_turns(x, dy), 4))
    assert all(torch.equal(a, x) and torch.equal(b, dy) for a, b in turns)
    assert len({a.data_ptr() for a, _ in turns}) == len({b.data_ptr() for _, b in turns}) == 3
