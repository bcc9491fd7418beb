"""What only a device can show. Skipped, and listed as skipped, where there is none."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels import batch_norm_act, ema_, info_nce_enqueue, preflight, reference, sgd_ema_
from fastmoco_kernels.info_nce_launch import info_nce_triton
from tests.kernels.oracle import features

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
