"""The CPU forms against float64: accuracy, extremes, memory, the papers' other mechanisms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import ema_, info_nce, info_nce_cpu, reference, sgd_ema_
from tests.kernels.oracle import (
    features,
    official_info_nce,
    official_rank,
    relative_error,
    rounding,
    worst,
)

pytestmark = pytest.mark.processor
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("n", "c", "k", "dtype", "queue_dtype", "temperature"),
    [
        (32, 128, 4096, F32, F32, 0.2),
        (33, 17, 1500, F32, F32, 0.07),
        (32, 128, 2000, BF16, F32, 0.2),
        (5, 512, 600, F16, BF16, 0.07),
        (1, 16, 1, F32, F32, 0.2),
        (8, 48, 1100, F32, F32, 0.02),
        (8, 48, 1100, F32, F32, 50.0),
    ],
)
def test_no_less_accurate_than_eager(
    n: int,
    c: int,
    k: int,
    dtype: torch.dtype,
    queue_dtype: torch.dtype,
    temperature: float,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(info_nce_cpu, "_ONEDNN", onednn and info_nce_cpu._onednn_is_there())
    monkeypatch.setattr(info_nce_cpu, "CHUNK_ROWS", (1, 700))  # several chunks, the last one ragged
    q, key, queue = features(n, c, k)
    q, key, queue = q.to(dtype), key.to(dtype), queue.to(queue_dtype)
    losses, rank, dq = info_nce_cpu.info_nce(q, key, queue, temperature)
    want, want_dq = official_info_nce(q, key, queue, temperature)
    eager, eager_dq = official_info_nce(q, key, queue, temperature, F32)
    slack = rounding(temperature, k)
    assert worst(losses, want) <= worst(eager, want) + slack
    assert relative_error(dq, want_dq) <= relative_error(eager_dq, want_dq) + slack
    assert torch.equal(rank, official_rank(q, key, queue))


def test_rows_of_any_length_and_two_equal_runs() -> None:
    q, key, queue = features(6, 32, 3000)
    for scale in (1e-3, 40.0):
        first = info_nce_cpu.info_nce(q * scale, key, queue, 0.07)
        again = info_nce_cpu.info_nce(q * scale, key, queue, 0.07)
        want, want_dq = official_info_nce(q * scale, key, queue, 0.07)
        torch.testing.assert_close(first[0].double(), want, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(first[2].double(), want_dq, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "queue"])
@pytest.mark.parametrize("form", [info_nce_cpu.info_nce, reference.info_nce])
def test_nan_and_inf_reach_the_loss(place: int, bad: float, form: object) -> None:
    tensors = features(3, 16, 40)
    tensors[place][1, 3] = bad
    assert callable(form)
    losses, _, _ = form(*tensors, 0.2)
    assert not losses.mean().isfinite()
    if place < 2:
        assert losses[[0, 2]].isfinite().all(), "one bad row must not spoil the others"


def test_nan_never_counts_as_success() -> None:
    q, key, queue = features(2, 16, 40)
    q[0, 0] = float("nan")
    assert info_nce(q, key, queue, 0.2).rank[0] == 40


def test_symmetric_loss_is_one_call_on_both_views() -> None:
    """The mean over 2N of (q1, k2), (q2, k1) against one queue, read once."""
    q1, k2, queue = features(5, 24, 300)
    q2, k1, _ = features(5, 24, 1, seed=8)
    first, first_dq = official_info_nce(q1, k2, queue, 0.2)
    second, second_dq = official_info_nce(q2, k1, queue, 0.2)
    q = torch.cat([q1, q2]).requires_grad_(True)
    out = info_nce(q, torch.cat([k2, k1]), queue, 0.2)
    out.loss.backward()
    assert worst(out.losses, torch.cat([first, second])) < rounding(0.2, 300)
    assert q.grad is not None
    assert relative_error(2 * q.grad, torch.cat([first_dq, second_dq])) < 1e-6


def test_memory_bank_is_the_same_op_on_sampled_rows() -> None:
    bank = features(200, 24, 1)[0]
    q = features(4, 24, 1, seed=2)[0]
    own, sampled = torch.tensor([3, 9, 27, 81]), torch.arange(100, 180)
    out = info_nce(q, bank[own], bank[sampled], 0.07)
    want, _ = official_info_nce(q, bank[own], bank[sampled], 0.07)
    assert worst(out.losses, want) < rounding(0.07, 80)


def test_updates_accept_other_layouts() -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    target, copy = weight.clone(), torch.empty_like(weight, dtype=BF16)
    source = torch.randn(8, 4, 3, 3)
    ema_([target], [source], 0.75, [copy])
    torch.testing.assert_close(target, 0.75 * weight + 0.25 * source)
    assert torch.equal(copy, target.to(BF16))
    p, buffer, ema = weight.clone(), torch.zeros_like(weight), weight.clone()
    sgd_ema_([p], [source], [buffer], [ema], lr=0.5, momentum=0.9, weight_decay=0.0, ema_momentum=0)
    torch.testing.assert_close(p, weight - 0.5 * source)
    torch.testing.assert_close(ema, p)


def test_update_copies_no_gradient_that_lies_like_its_parameter() -> None:
    """Fused SGD would make channels-last gradients contiguous: a third of the update's time."""
    lists = [
        [torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(5)]
        for _ in range(4)
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        sgd_ema_(*lists, lr=0.5, momentum=0.9, weight_decay=0.1, ema_momentum=0.5)
    names = {event.name for event in profiler.events()}
    assert "aten::_fused_sgd_" in names
    assert not {"aten::clone", "aten::copy_"} & names


@pytest.mark.parametrize("form", ["gaps", "strides", "dtype", "shadow"])
def test_updates_refuse_what_they_cannot_walk(form: str) -> None:
    a, b = torch.zeros(6, 4), torch.zeros(6, 4)
    targets: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {
        "gaps": ([a[:, :2]], [b[:, :2]], []),
        "strides": ([a], [b], [torch.zeros(4, 6, dtype=BF16).T]),
        "dtype": ([a.half()], [b.half()], []),
        "shadow": ([a], [b], [torch.zeros(6, 4)]),
    }
    with pytest.raises(ValueError, match=r"gaps|strides|float32|bfloat16"):
        ema_(targets[form][0], targets[form][1], 0.9, targets[form][2])


FOUR_MILLION = """
import resource, torch
from fastmoco_kernels import info_nce_enqueue
k = 2**22
queue = torch.empty(k, 128)
for rows in queue.split(2**16):
    torch.nn.functional.normalize(rows.normal_(), dim=1, out=rows)
q = torch.nn.functional.normalize(torch.randn(16, 128), dim=1).requires_grad_(True)
pointer = torch.tensor([k - 4])
out = info_nce_enqueue(q, q.detach(), q.detach(), queue, pointer, 0.2)
out.loss.backward()
assert q.grad.isfinite().all() and pointer.item() == 12
print(out.loss.item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_four_million_negatives_within_four_gigabytes() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FOUR_MILLION],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, gigabytes = map(float, run.stdout.split())
    # For random unit vectors in 128 dimensions q.u is nearly normal with variance 1/128, so
    # E exp(q.u / T) = exp(1 / (256 T^2)) and the loss is close to ln K + 1 / (256 T^2) - 1 / T.
    assert abs(loss - (15.2492 + 0.0977 - 5.0)) < 0.01
    assert gigabytes < 4.0


def test_more_than_two_to_the_31_logits() -> None:
    n, k = 4096, 2**19 + 7
    q, key, queue = features(n, 16, k)
    losses, rank, _ = info_nce_cpu.info_nce(q, key, queue, 0.2)
    for row in (0, n - 1):
        pick = slice(row, row + 1)
        want, _ = official_info_nce(q[pick], key[pick], queue, 0.2)
        assert worst(losses[pick], want) < 4 * rounding(0.2, k)
        assert torch.equal(rank[pick], official_rank(q[pick], key[pick], queue))
