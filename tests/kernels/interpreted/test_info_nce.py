"""The Triton InfoNCE kernels, interpreted on the CPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import info_nce, info_nce_cpu, reference
from fastmoco_kernels.info_nce_launch import (
    Configuration,
    exact_shift,
    info_nce_triton,
    launch_configuration,
    plan,
)
from tests.kernels.interpreter import watched
from tests.kernels.oracle import (
    features,
    official_info_nce,
    official_rank,
    relative_error,
    rounding,
    worst,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def rounded(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as the kernel sees them: everything in q's dtype."""
    return q, k.to(q.dtype), queue.to(q.dtype)


@pytest.mark.parametrize(
    ("n", "c", "k", "dtype", "queue_dtype", "temperature"),
    [
        (32, 128, 1024, F32, F32, 0.2),
        (32, 128, 1024, BF16, F32, 0.2),
        (32, 128, 1024, F16, F16, 0.07),
        (5, 24, 333, F32, F32, 0.07),
        (5, 17, 333, BF16, BF16, 0.07),
        (65, 33, 130, BF16, F32, 0.5),
        (1, 16, 1, F32, F32, 0.2),
        (1, 100, 700, F16, F32, 0.2),
        (8, 48, 500, F32, BF16, 0.01),
        (8, 48, 500, BF16, F32, 0.01),
        (3, 512, 70, BF16, F32, 0.2),
        (3, 257, 70, F32, F32, 5.0),
    ],
)
def test_no_less_accurate_than_eager_in_the_same_dtype(
    n: int, c: int, k: int, dtype: torch.dtype, queue_dtype: torch.dtype, temperature: float
) -> None:
    q, key, queue = features(n, c, k)
    q, key, queue = q.to(dtype), key.to(dtype), queue.to(queue_dtype)
    with watched():
        losses, rank, dq = info_nce_triton(q, key, queue, temperature)
    inputs = rounded(q, key, queue)
    want, want_dq = official_info_nce(*inputs, temperature)
    eager, eager_dq = official_info_nce(*inputs, temperature, dtype)
    slack = rounding(temperature, k)
    assert worst(losses, want) <= worst(eager, want) + slack
    assert relative_error(dq, want_dq) <= relative_error(eager_dq, want_dq) + slack
    assert torch.equal(rank, official_rank(*inputs))


@pytest.mark.parametrize(
    ("k", "m", "cursor"), [(90, 7, 0), (90, 90, 31), (90, 40, 89), (90, 1, 89)]
)
@pytest.mark.parametrize("queue_dtype", [F32, BF16])
def test_enqueue_wraps_and_the_loss_sees_the_old_queue(
    k: int, m: int, cursor: int, queue_dtype: torch.dtype
) -> None:
    q, key, queue = features(4, 20, k)
    queue = queue.to(queue_dtype)
    keys, ptr = features(m, 20, 1, seed=9)[0], torch.tensor([cursor])
    old, expected = queue.clone(), queue.clone()
    with watched():
        losses, _, _ = info_nce_triton(q, key, queue, 0.2, keys, ptr)
    for i in range(m):
        expected[(cursor + i) % k] = keys[i].to(queue_dtype)
    assert torch.equal(queue, expected)
    assert ptr.tolist() == [(cursor + m) % k]
    want, _ = official_info_nce(*rounded(q, key, old), 0.2)
    assert relative_error(losses, want) < 1e-6


def test_degenerate_rows() -> None:
    """Identical keys, q equal to a queue row, q zero, k zero, a queue of zeros in part."""
    q, key, queue = features(6, 32, 200)
    queue[10:20] = key[0]
    queue[50] = q[1]
    q[2] = 0
    key[3] = 0
    queue[100:150] = 0
    losses, rank, dq = info_nce_triton(q, key, queue, 0.07)
    want, want_dq = official_info_nce(q, key, queue, 0.07)
    assert relative_error(losses, want) < 1e-6
    assert relative_error(dq, want_dq) < 1e-6
    assert torch.equal(rank, official_rank(q, key, queue))
    assert rank[2] == 200
    assert rank[0] >= 10


def test_a_collapsed_encoder_scores_nothing() -> None:
    one = features(1, 48, 1)[0]
    for dtype in (F32, BF16, F16):
        row = one.to(dtype)
        rank = info_nce_triton(row.repeat(9, 1), row.repeat(9, 1), row.repeat(77, 1), 0.2)[1]
        assert rank.tolist() == [77] * 9


@pytest.mark.parametrize("temperature", [0.2, 0.02])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "queue"])
def test_nan_and_inf_reach_the_loss(place: int, bad: float, temperature: float) -> None:
    tensors = features(3, 16, 40)
    tensors[place][1, 3] = bad
    losses, _, _ = info_nce_triton(*tensors, temperature)
    assert not losses.mean().isfinite()
    if place < 2:
        assert losses[[0, 2]].isfinite().all(), "one bad row must not spoil the others"


@pytest.mark.parametrize(("of_q", "of_k"), [(30.0, 1.0), (1.0, 30.0), (12.0, 12.0)])
def test_rows_that_are_not_normalized_take_the_exact_path(of_q: float, of_k: float) -> None:
    q, key, queue = features(4, 32, 300)
    q, key = q * of_q, key * of_k
    losses, _, dq = info_nce_triton(q, key, queue, 0.07)
    want, want_dq = official_info_nce(q, key, queue, 0.07)
    assert torch.allclose(losses.double(), want, rtol=1e-6, atol=1e-5)
    assert torch.allclose(dq.double(), want_dq, rtol=1e-4, atol=1e-6)


def test_bits_repeat_and_the_number_of_slices_hardly_matters() -> None:
    q, key, queue = features(20, 64, 900)
    first, again = info_nce_triton(q, key, queue, 0.2), info_nce_triton(q, key, queue, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for slices, rows in ((1, 960), (2, 512), (3, 320), (15, 64)):
        steps = plan(
            q, key, queue, 0.2, configuration=Configuration(32, 64, 64, rows, slices, 4, 1)
        )
        with watched() as watch:
            steps.partial.run()
            steps.reduce.run()
        assert len(watch.programs) >= slices
        assert relative_error(steps.losses, first[0]) < 1e-6
        assert relative_error(steps.dq, first[2]) < 1e-6
        assert torch.equal(steps.rank, first[1])


def test_every_configuration_runs() -> None:
    """Each tile shape that can be chosen, with ragged N, K and C."""
    seen: set[tuple[object, ...]] = set()
    for arch in (80, 90, 100):
        for dtype in (F32, F16, BF16):
            for n in (3, 70):
                for c in (60, 120, 250, 500):
                    for t in (0.2, 0.02):
                        tiles = launch_configuration(n, 150, c, dtype, arch, multiprocessors=2)
                        key = (*tiles, exact_shift(dtype, t), dtype)
                        if key not in seen:
                            seen.add(key)
                            run_once(n, c, dtype, t, tiles)
    assert len(seen) > 10


def run_once(n: int, c: int, dtype: torch.dtype, temperature: float, tiles: Configuration) -> None:
    q, key, queue = (t.to(dtype) for t in features(n, c, 150))
    steps = plan(q, key, queue, temperature, configuration=tiles)
    with watched():
        steps.partial.run()
        steps.reduce.run()
    want, want_dq = official_info_nce(q, key, queue, temperature)
    eager, eager_dq = official_info_nce(q, key, queue, temperature, dtype)
    slack = rounding(temperature, 150)
    assert worst(steps.losses, want) <= worst(eager, want) + slack
    assert relative_error(steps.dq, want_dq) <= relative_error(eager_dq, want_dq) + slack


def test_addresses_beyond_two_to_the_31() -> None:
    """A row stride of 2**27 elements puts row 20 beyond 32 bits; most memory is never touched."""
    stride, k = 2**27, 24
    q, key, queue = (t.to(BF16) for t in features(1, 64, k))
    far = torch.empty(k * stride, dtype=BF16)
    rows = far.as_strided((k, 64), (stride, 1))
    rows.copy_(queue)
    keys, ptr = features(2, 64, 1, seed=4)[0].to(BF16), torch.tensor([k - 3])
    steps = plan(q, key, queue, 0.2, keys[:1], ptr)
    swap = {"queue": far, "C": stride}
    replace(steps.partial, arguments=steps.partial.arguments | swap).run()
    replace(steps.reduce, arguments=steps.reduce.arguments | swap).run()
    want, _ = official_info_nce(q, key, queue, 0.2)
    assert relative_error(steps.losses, want) < 1e-4
    queue[k - 3] = keys[0]
    assert torch.equal(rows, queue)


def test_autograd_and_reference_through_the_public_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(info_nce_cpu, "info_nce", info_nce_triton)
    q, key, queue = features(6, 40, 100)
    _, want_dq = official_info_nce(q, key, queue, 0.1)
    strided = q.T.contiguous().T.requires_grad_(True)
    out = info_nce(strided, key, queue, 0.1)
    (2 * out.loss).backward()
    assert strided.grad is not None
    assert relative_error(strided.grad, 2 * want_dq) < 1e-6
    losses, rank, dq = reference.info_nce(q, key, queue, 0.1)
    assert worst(out.losses, losses) < rounding(0.1, 100)
    assert torch.equal(out.rank, rank)
    assert relative_error(dq, want_dq) < 1e-6


def test_small_losses_keep_their_digits() -> None:
    q, _, queue = features(4, 64, 50)
    losses, _, _ = info_nce_triton(q, q, queue, 0.02)
    gap = (q.double() @ queue.double().T - (q.double() ** 2).sum(1, keepdim=True)) / 0.02
    want = torch.log1p(gap.exp().sum(1))  # the difference of cross_entropy is too coarse in float64
    assert want.max() < 1e-8
    torch.testing.assert_close(losses.double(), want, rtol=1e-4, atol=0)
