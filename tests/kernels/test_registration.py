"""The ops as torch sees them: opcheck, tracing for absent devices, the emergency exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmoco_kernels as ops
from fastmoco_kernels import ema, info_nce_cpu, launch, preflight, sgd_ema
from tests.kernels.oracle import features


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, queue = features(4, 16, 10)
    return q.to(dtype), k.to(dtype), queue, torch.tensor([8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    from fastmoco_kernels.info_nce import (
        _enqueue,
        _info_nce,
        _info_nce_enqueue,
        _mean_with_gradient,
    )
    from fastmoco_kernels.network.max_pool import _backward, _max_pool

    q, k, queue, pointer = _inputs(dtype)
    weights = [torch.randn(3, 5), torch.randn(7)]

    def copies() -> list[Tensor]:
        return [w.clone() for w in weights]

    shadows = [w.bfloat16() for w in weights]
    torch.library.opcheck(_info_nce, (q, k, queue, 0.2))
    torch.library.opcheck(_info_nce_enqueue, (q, k, k, queue, pointer, 0.2))
    torch.library.opcheck(_enqueue, (k, queue, pointer))
    losses, dq = torch.rand(4), torch.rand(4, 16)
    torch.library.opcheck(_mean_with_gradient, (q.requires_grad_(True), losses, dq))
    torch.library.opcheck(ema._ema, (copies(), copies(), 0.9, shadows))
    scaled = (torch.tensor(2.0), torch.tensor(0.0))
    x = torch.randn(2, 3, 9, 8).to(dtype, memory_format=torch.channels_last)
    index = _max_pool(x, 3, 2, 1)[1]
    torch.library.opcheck(_max_pool, (x.requires_grad_(True), 3, 2, 1))
    torch.library.opcheck(_backward, (torch.randn(2, 3, 5, 4), index, 9, 8, 3, 2, 1))
    for scaler in ((), scaled):
        torch.library.opcheck(
            sgd_ema._sgd_ema,
            (copies(), copies(), copies(), copies(), torch.tensor(0.1), 0.9, 1e-4, 0.99, *scaler),
        )


def _step(q: Tensor, queue: Tensor, pointer: Tensor, p: Tensor, lr: Tensor) -> Tensor:
    loss = ops.info_nce_enqueue(q, q, q, queue, pointer, 0.2).loss
    p = p.clone()
    ops.ema_([p], [p * 2], 0.9)
    ops.sgd_ema_(
        [p], [p * 3], [p * 0], [p * 1], lr=lr, momentum=0.9, weight_decay=0.0, ema_momentum=0.9
    )
    return loss


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_graph_on_devices_that_are_not_there(device: str) -> None:
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(n.target) for n in module.graph.nodes if "fastmoco" in str(n.target)])
        return module.forward

    with FakeTensorMode():
        q = torch.empty(8, 32, device=device, dtype=torch.bfloat16)
        queue, p = torch.empty(100, 32, device=device), torch.empty(5, 5, device=device)
        pointer = torch.empty(1, dtype=torch.int64, device=device)
        compiled = torch.compile(_step, fullgraph=True, backend=backend)
        loss = compiled(q, queue, pointer, p, torch.empty((), device=device))
    assert loss.device.type == device
    assert loss.dtype == torch.float32
    assert len(graphs) == 1
    assert [name.split(".")[1] for name in graphs[0]] == [
        "info_nce_enqueue",
        "mean_with_gradient",
        "ema_",
        "sgd_ema_",
    ]


def test_a_new_learning_rate_compiles_nothing() -> None:
    compilations = 0

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return module.forward

    step = torch.compile(_step, fullgraph=True, backend=backend)
    q, _, queue, pointer = _inputs(torch.float32)
    for lr in (0.1, 0.05, 0.025):
        step(q, queue, pointer, torch.ones(5, 5), torch.tensor(lr))
    assert compilations == 1


def test_a_second_derivative_is_refused() -> None:
    q, k, queue, _ = _inputs(torch.float32)
    q.requires_grad_(True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(ops.info_nce(q, k, queue, 0.2).loss, q, create_graph=True)


def test_preflight_passes_here_and_finds_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    results = preflight.check("cpu")
    assert {r.op for r in results} == set(launch.OPS)
    assert all(r.passed for r in results), [r for r in results if not r.passed]

    right = info_nce_cpu.info_nce

    def slightly_wrong(q: Tensor, k: Tensor, queue: Tensor, t: float) -> object:
        return right(q, k, queue[:-1], t)  # an off-by-one in the last mask

    monkeypatch.setattr(info_nce_cpu, "info_nce", slightly_wrong)
    failed = [r for r in preflight.check("cpu") if not r.passed]
    assert {r.op for r in failed} >= {"info_nce"}


def test_the_emergency_exit_warns_and_is_undone() -> None:
    with pytest.warns(RuntimeWarning, match=r"ema_ is switched off \(wrong on this device\)"):
        launch.use_reference("ema_", "wrong on this device")
    assert launch.replaced() == {"ema_": "wrong on this device"}
    launch.use_kernel("ema_")
    assert not launch.replaced()
    with pytest.raises(ValueError, match="unknown op 'emma_'"):
        launch.use_reference("emma_", "")
