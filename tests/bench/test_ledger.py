"""The ledger counts what can be counted by hand, and the model divides it by the right rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.ledger import PARSER, Ledger, main, words
from bench.measure.program import options
from bench.roofline import H100, Kernel
from fastmoco.config import ConfigError
from fastmoco_kernels.aot import info_nce_cases
from tests.support.gpu.fake_cuda import printed_by
from tests.support.tiny import BATCH, CONFIG

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a machine without GPU")
Kernels = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tests.support.gpu.counted_graphs` prints, from a process of its own."""
    return printed_by("tests.support.gpu.counted_graphs")


def part(kernels: Kernels, name: str) -> Kernels:
    return [kernel for kernel in kernels if kernel["part"] == name]


def total(kernels: Kernels, figure: str) -> int:
    return sum(int(kernel["calls"] * kernel[figure]) for kernel in kernels)


def one(part: str, moved: int) -> dict[str, Any]:
    figures = {"calls": 1, "launches": 1, "bytes": moved, "flops": 0, "atomics": 0}
    return {"part": part, **figures}


@needs_no_gpu
def test_generated_kernels_move_what_they_load_and_store(found: dict[str, Any]) -> None:
    assert found["add and relu"] == [one("pointwise", 3 * 4 * 1000 * 1000)]
    assert found["sum of rows"] == [one("reductions", 2 * 512 * 4096 + 2 * 512)]
    # Windows overlap, but the cache holds what they share.
    assert found["pool"] == [one("pointwise", 4 * 4 * 8 * (16 * 16 + 8 * 8))]


@needs_no_gpu
def test_convolutions_read_operands_and_write_results_once_per_launch(
    found: dict[str, Any],
) -> None:
    image, weight, flops = 4 * 8 * 16 * 16 * 4, 8 * 8 * 9 * 4, 2 * 4 * 16 * 16 * 8 * 8 * 9
    forward, backward = sorted(
        part(found["gradients of a pool"], "convolutions"), key=lambda k: k["launches"]
    )
    assert (forward["launches"], forward["flops"]) == (1, flops)
    assert forward["bytes"] == image + weight + image
    # The gradient of the images reads that of the output and weights, the one of the weights reads
    # that of the output and images.
    assert (backward["launches"], backward["flops"]) == (2, 2 * flops)
    assert backward["bytes"] == (image + weight + image) + (image + image + weight)


@needs_no_gpu
def test_atomics_are_counted_where_the_gradient_of_max_pooling_scatters(
    found: dict[str, Any],
) -> None:
    assert total(found["gradients of a pool"], "atomics") == 1
    assert total(found["add and relu"] + found["sum of rows"], "atomics") == 0
    scatters = next(kernel for kernel in found["gradients of a pool"] if kernel["atomics"])
    assert scatters["part"] == "pointwise"


@needs_no_gpu
def test_our_ops_move_what_they_declare_or_else_every_operand_and_result(
    found: dict[str, Any],
) -> None:
    step, n = found["step of two ranks"], BATCH // 2
    float32, dim = torch.float32, CONFIG.model.dim
    cases = info_nce_cases(n, dim, CONFIG.moco.queue_size, float32, float32, 90)
    mean = 2 * 4 * n * dim + 4 * n + 4  # queries, their gradient, losses; the mean
    # Four lists read, three written; the rate and whether the step is left out.
    update = (4 + 3) * 4 * found["parameters"] + 2 * 4
    ours = {(kernel["launches"], kernel["bytes"]) for kernel in part(step, "our ops")}
    seen = 4 * found["parameters"] + 1  # gradients; whether one is not finite
    assert found["ops"] == ["any_not_finite", "info_nce_enqueue", "mean_with_gradient", "sgd_ema_"]
    assert ours == {(2, sum(case.bytes for case in cases)), (1, mean), (1, update), (1, seen)}


@needs_no_gpu
def test_collectives_of_a_step_are_counted_without_their_waits(found: dict[str, Any]) -> None:
    collectives = part(found["step of two ranks"], "collectives")
    n, side = BATCH // 2, CONFIG.augment.image_size
    images, keys = 2 * n * side * side * 3, (1 + 2) * n * CONFIG.model.dim * 4
    gradients = 2 * 4 * found["parameters"]
    assert total(collectives, "bytes") == images + keys + gradients
    assert total(collectives, "launches") == 3


def test_the_last_line_holds_the_sums_over_all_calls() -> None:
    kernels = [Kernel("reductions", 3, 1, 10**9, 0, 2), Kernel("convolutions", 2, 2, 10**6, 5)]
    line = Ledger(kernels, 1, []).last_line()
    assert line == "launches 7, GB moved 3.002, atomics 6, generated kernels 1"


def test_a_kernel_takes_the_longest_of_arithmetic_traffic_and_launches() -> None:
    assert Kernel("pointwise", 10, 2, 8).seconds(H100) == pytest.approx(10 * 2 * 4e-6)
    assert Kernel("our ops", 2, 3, 29 * 10**8).seconds(H100) == pytest.approx(2e-3, rel=1e-3)
    product = Kernel("convolutions", 1, 1, 8, 593_400 * 10**6)  # at 60 % of 989 TFLOP/s
    assert product.seconds(H100) == pytest.approx(1e-3)
    assert Kernel("collectives", 1, 1, 3 * 10**9).seconds(H100) == pytest.approx(0.01)  # 300 GB/s


def test_options_are_checked_as_those_of_the_step_that_is_counted() -> None:
    """A queue that is too short for the recipe's batch is long enough for this one."""
    given = ["--ranks", "2", "--batch", "16", "--moco.queue_size", "64"]
    own = options(PARSER, given, trains=True, words=words)
    assert (own.config.optim.global_batch_size, own.config.run.cuda_graph) == (32, "off")
    with pytest.raises(ConfigError, match="queue_size 64"):
        options(PARSER, [*given, "--batch", "256"], trains=True, words=words)


@needs_no_gpu
def test_what_cannot_train_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "0"]) == 2
    assert capsys.readouterr().err.startswith("ledger: optim.global_batch_size is 0")
