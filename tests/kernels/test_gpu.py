"""What only a device can show. Skipped, and listed as skipped, where there is none."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels import ema_, info_nce_enqueue, preflight, sgd_ema_
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
