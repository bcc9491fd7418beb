"""What only a device can show. Skipped, and listed as skipped, where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.config import AugmentConfig
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco_kernels import (
    batch_norm_act,
    crop_resize,
    ema_,
    info_nce_enqueue,
    max_pool,
    photometric,
    preflight,
    reference,
    sgd_ema_,
)
from fastmoco_kernels.info_nce_launch import info_nce_triton
from fastmoco_kernels.network.max_pool import Window
from tests.kernels.oracle import features
from tests.support.data.boxes import apart, drawn_boxes, resized_by_pil
from tests.support.oracles.photometric import by_pil, small_views, table_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_preflight_passes() -> None:
    failed = [r for r in preflight.check("cuda") if not r.passed]
    assert not failed, failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    q, k, queue = (t.to("cuda", dtype) for t in features(256, 128, 65536))
    first, again = info_nce_triton(q, k, queue, 0.2), info_nce_triton(q, k, queue, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_step_never_synchronizes_and_replays_in_a_graph() -> None:
    q, k, queue = (t.cuda() for t in features(32, 128, 4096))
    pointer = torch.zeros(1, dtype=torch.int64, device="cuda")
    p, g, buffer, ema = (torch.randn(3, 4097, device="cuda") for _ in range(4))
    lr = torch.tensor(0.1, device="cuda")

    def step() -> torch.Tensor:
        loss = info_nce_enqueue(q, k, k, queue, pointer, 0.2).loss
        sgd_ema_([p], [g], [buffer], [ema], lr=lr, momentum=0.9, weight_decay=0, ema_momentum=0.9)
        ema_([ema], [p], 0.9)
        return loss

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = int(pointer)
    graph.replay()
    graph.replay()
    assert int(pointer) == (before + 64) % 4096


def _normalized(dtype: torch.dtype, added: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What batch norm over 8 groups gives, and what its definition in float64 gives."""
    torch.manual_seed(0)
    x, residual, dy = torch.randn(3, 64, 256, 28, 28, device="cuda").to(dtype)
    tensors = [
        3 * x + 1,
        torch.randn(256, device="cuda"),
        torch.randn(256, device="cuda"),
        residual,
    ]
    counter, found = torch.tensor(0, device="cuda"), []
    for kind in (None, torch.float64):
        leaves = [t.detach().to(dtype=kind).requires_grad_() for t in tensors[: 3 + added]]
        leaves[0] = leaves[0].detach().contiguous(memory_format=torch.channels_last)
        leaves[0].requires_grad_()
        running = [torch.zeros(256, dtype=kind, device="cuda") for _ in range(2)]
        last = (0.1, 1e-5, 8, True)
        first = (leaves[0], leaves[3] if added else None, leaves[1], leaves[2])
        if kind is None:
            y = batch_norm_act(*first, running[0], running[1], counter, *last)
        else:
            y = reference.batch_norm_act(*first, running[0], running[1], True, *last)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)), *running])
    return found[0], found[1]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_norm_equals_float64_and_repeats_its_bits(dtype: torch.dtype, added: bool) -> None:
    got, want = _normalized(dtype, added)
    allowed = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, truth in zip(got, want, strict=True):
        # In norm: beside the kink of the ReLU single gradients are right either way.
        assert float((mine - truth).norm() / truth.norm()) < allowed
    again, _ = _normalized(dtype, added)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_batch_norm_replays_in_a_graph_and_never_synchronizes() -> None:
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(64, device="cuda", requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    counter = torch.tensor(0, device="cuda")

    def step() -> torch.Tensor:
        y = batch_norm_act(x, None, weight, bias, mean, var, counter, 0.1, 1e-5, 2, True)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = int(counter)
    graph.replay()
    graph.replay()
    assert int(counter) == before + 2


def both_passes(
    pool: Callable[..., Tensor], x: Tensor, dy: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """What `pool` makes of x, and the gradient."""
    x = x.detach().requires_grad_(True)
    y = pool(x, *window)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((16, 64, 112, 112), (3, 2, 1)),  # behind the stem of every ResNet
        ((5, 64, 111, 97), (3, 2, 1)),
        ((3, 24, 13, 10), (2, 2, 0)),
        ((2, 7, 9, 8), (3, 1, 1)),
        ((2, 3, 11, 12), (2, 3, 0)),  # some inputs are in no window
    ],
)
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_max_pool_is_that_of_float64_and_repeats_its_bits(
    dtype: torch.dtype, shape: tuple[int, ...], window: Window, memory: torch.memory_format
) -> None:
    """Whole numbers: many ties, and sums of gradients that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, shape, generator=generator).float()
    x[0, 0], x[-1, -1, 2:5, 2:6] = float("-inf"), float("nan")
    x[0, 1, 0, 0], x[0, 1, 4, 4], x[-1, 1, -1, -1] = float("nan"), float("inf"), float("-inf")
    dy = torch.randint(-3, 4, F.max_pool2d(x, *window).shape, generator=generator).float()
    want = both_passes(F.max_pool2d, x.double(), dy.double(), window)
    x, dy = (t.to("cuda", dtype, memory_format=memory) for t in (x, dy))
    got, again = (both_passes(max_pool, x, dy, window) for _ in range(2))
    for mine, second, truth in zip(got, again, want, strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mine.double().cpu(), truth, rtol=0, atol=0, equal_nan=True)
        view = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(mine.view(view), second.view(view))


@pytest.mark.parametrize("side", [224, 97])
def test_views_are_pils_pixels_and_cost_no_synchronization(side: int) -> None:
    augment = AugmentConfig(hue=0.4, blur_max=3)
    views = small_views(64, side)
    table = table_for(views, augment)
    rows = torch.from_numpy(photometric_rows(table, "v2")).cuda()
    pixels = torch.from_numpy(views).cuda()
    photometric(pixels, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [photometric(pixels, rows) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = torch.from_numpy(by_pil(views, table, "v2"))
    assert all(torch.equal(one.cpu(), want) for one in found)


@pytest.mark.parametrize("side", [224, 97])
def test_crops_are_pils_pixels_and_cost_no_synchronization(side: int) -> None:
    pictures, which, boxes = drawn_boxes(64, 700)
    there = [one.cuda() for one in pictures]
    crop_resize(there, which, boxes, side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [crop_resize(there, which, boxes, side) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = resized_by_pil(pictures, which, boxes, side)
    assert all(apart(one.cpu(), want) <= 0 for one in found)


def test_max_pool_adds_gradients_as_near_to_float64_as_bfloat16_is() -> None:
    """Of continuous values, where a sum has to be rounded once and not after every addition."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 112, 112, device="cuda").bfloat16()
    dy = torch.randn(8, 64, 56, 56, device="cuda").bfloat16()
    _, want = both_passes(F.max_pool2d, x.double(), dy.double(), (3, 2, 1))
    runs = [both_passes(max_pool, x, dy, (3, 2, 1))[1] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    # Half a unit in the last place, and what float32 adds to it where sums cancel.
    assert bool(((runs[0] - want).abs() <= 2.0**-8 * want.abs() + 2.0**-20).all())
