"""The ops as torch sees them: opcheck, tracing for absent devices, the emergency exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import OperatorIssue
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmoco_kernels as ops
from fastmoco_kernels import ema, info_nce_cpu, launch, preflight, reference, sgd_ema
from fastmoco_kernels.inductor import name_operands_by_type
from fastmoco_kernels.network import batch_norm
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


def nhwc(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_batch_norm(dtype: torch.dtype) -> None:
    x, residual, dy = map(nhwc, torch.randn(3, 4, 5, 3, 2).to(dtype))
    running, counter = [torch.zeros(5), torch.ones(5)], torch.tensor(0)
    torch.library.opcheck(batch_norm._statistics, (x, *running, counter, 0.1, 2))
    mean, var = batch_norm._statistics(x, *running, counter, 0.1, 2)
    per_channel = [t.requires_grad_(True) for t in torch.randn(2, 5).unbind()]
    for added in (None, residual):
        leaf = x.detach().requires_grad_(True)
        last = (*per_channel, mean, var, 1e-5, True)
        torch.library.opcheck(batch_norm._apply, (leaf, added, *last))
        plain = (*(t.detach() for t in per_channel), *last[2:])
        y = None if added is None else batch_norm._apply(x, added, *plain)
        torch.library.opcheck(batch_norm._backward, (dy, x, y, *plain))


def test_batch_norm_with_a_residual_and_gradients_is_one_graph_and_equals_its_definition() -> None:
    """In float64 through the reference on the CPU: the wiring of the autograd formula."""
    x, residual, dy = map(nhwc, torch.randn(3, 6, 5, 3, 2))
    tensors = [x, residual, *torch.randn(2, 5)]

    def step(x: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
        function: Callable[..., Tensor] = ops.batch_norm_act
        y = function(x, residual, *norm, 0.1, 1e-5, 3, True)
        return function(y, None, *norm, 0.1, 1e-5, 1, False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for function in (step, compiled):
        running = [torch.zeros(5), torch.ones(5), torch.tensor(0)]
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, *running)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy), *running])
    leaves = [t.double().requires_grad_() for t in tensors]
    running = [torch.zeros(5).double(), torch.ones(5).double()]
    settings = (*leaves[2:], *running, True, 0.1, 1e-5)
    definition: Callable[..., Tensor] = reference.batch_norm_act
    y = definition(leaves[0], leaves[1], *settings, 3, True)
    y = definition(y, None, *settings, 1, False)
    truth = [y.detach(), *torch.autograd.grad(y, leaves, dy.double()), *running, torch.tensor(2)]
    for mine in found:
        for got, want in zip(mine, truth, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5, 1, 1).long()}, "floating"),
        ({"groups": 3}, "multiple of groups"),
        ({"groups": 4, "x": torch.zeros(4, 5, 1, 1)}, "more than one value"),
        ({"residual": torch.zeros(4, 5, 2, 1)}, r"residual \(4, 5, 2, 1\)"),
        ({"weight": torch.zeros(4)}, "per channel"),
        ({"bias": torch.zeros(5).half()}, "per channel"),
    ],
)
def test_batch_norm_refuses_what_it_would_get_wrong(
    change: dict[str, object], message: str
) -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    right: dict[str, Any] = {name: torch.zeros(5) for name in names}
    right |= {"x": torch.zeros(4, 5, 2, 2), "residual": None, "counter": torch.tensor(0)}
    right |= {"momentum": 0.1, "eps": 1e-5, "groups": 2, "relu": True}
    with pytest.raises(ValueError, match=message):
        ops.batch_norm_act(**right | change)


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


def test_messages_of_the_compiler_write_no_operand_out() -> None:
    """Of torch 2.11 one message is made for each operation, with the text of the whole network."""

    class Loud:
        def __str__(self) -> str:
            raise AssertionError("written out")

    name_operands_by_type()
    text = OperatorIssue.operator_str("fastmoco.op", [Loud(), 1], {"side": Loud()})
    assert text.splitlines() == [
        "  target: fastmoco.op",
        "  args[0]: Loud",
        "  args[1]: int",
        "  kwargs['side']: Loud",
    ]
