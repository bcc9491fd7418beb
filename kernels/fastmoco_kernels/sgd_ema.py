"""Weight decay, momentum SGD and the momentum update of the key encoder in one pass.

    buf <- momentum buf + (g + weight_decay p)
    p   <- p - lr buf                                   (torch.optim.SGD, dampening 0, no Nesterov)
    ema <- m ema + (1 - m) p                                        (equation 2 of arXiv 1911.05722)

params, grads, momentum_buffers, ema_params: L float32 tensors each; lr: one float32 on the device.
The key encoder might as well move before its next forward: p stays as it is in between. Replaces
`torch.optim.SGD.step()` and then `ema_`: 28 bytes per parameter instead of 32, one launch. A buffer
of zeros makes the first step that of SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels import launch, reference
from fastmoco_kernels.launch import Launch, architecture, jit, tl
from fastmoco_kernels.multi_tensor import Table, address, check_lists, flat, like, locate, table


@jit
def _step(p, g, buf, ema, lr, inverse, found, momentum, weight_decay, weight):  # type: ignore[no-untyped-def]
    new_buf = momentum * buf + (g * inverse + weight_decay * p)
    buf = tl.where(found == 0.0, new_buf, buf)
    p = tl.where(found == 0.0, p - lr * new_buf, p)
    return p, buf, tl.where(found < 0.0, ema, ema + weight * (p - ema))


@jit
def _sgd_ema_kernel(  # type: ignore[no-untyped-def]
    rows,  # (L, 6) int64
    owner,  # (B,) int32
    lr_ptr,  # (1,) float32
    grad_scale_ptr,  # (1,) float32 or None
    found_inf_ptr,  # (1,) float32 or None
    momentum,
    weight_decay,
    weight,  # 1 - ema_momentum
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row, start, size = locate(rows, owner, 6, BLOCK)
    lane = tl.arange(0, BLOCK)
    p_ptr = address(row, 0, tl.float32, ALIGNED) + start + lane
    g_ptr = address(row, 1, tl.float32, ALIGNED) + start + lane
    buf_ptr = address(row, 2, tl.float32, ALIGNED) + start + lane
    ema_ptr = address(row, 3, tl.float32, ALIGNED) + start + lane
    lr = tl.load(lr_ptr)
    inverse, found = 1.0, 0.0
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr)
    if found_inf_ptr is not None:
        found = tl.load(found_inf_ptr)
    # A ragged mask forbids vector accesses, so only the last program of a tensor has one.
    if start + BLOCK <= size:
        p, g, buf, ema = tl.load(p_ptr), tl.load(g_ptr), tl.load(buf_ptr), tl.load(ema_ptr)
        p, buf, ema = _step(p, g, buf, ema, lr, inverse, found, momentum, weight_decay, weight)
        tl.store(p_ptr, p)
        tl.store(buf_ptr, buf)
        tl.store(ema_ptr, ema)
    else:
        inside = lane < size - start
        p, g = tl.load(p_ptr, mask=inside), tl.load(g_ptr, mask=inside)
        buf, ema = tl.load(buf_ptr, mask=inside), tl.load(ema_ptr, mask=inside)
        p, buf, ema = _step(p, g, buf, ema, lr, inverse, found, momentum, weight_decay, weight)
        tl.store(p_ptr, p, mask=inside)
        tl.store(buf_ptr, buf, mask=inside)
        tl.store(ema_ptr, ema, mask=inside)


def launch_configuration(arch: int) -> tuple[int, int]:
    """Elements per program and warps. Bandwidth-bound: 8 vector loads per thread in flight."""
    return 1024, 4


def sgd_ema_launch(
    pointers: Table,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    arch: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Launch:
    """The one launch of `sgd_ema_` over a table of params, grads, buffers and EMA params."""
    block, warps = launch_configuration(arch)
    arguments = {
        "rows": pointers.rows,
        "owner": pointers.owner,
        "lr_ptr": lr,
        "grad_scale_ptr": grad_scale,
        "found_inf_ptr": found_inf,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "weight": 1.0 - ema_momentum,
        "BLOCK": block,
        "ALIGNED": pointers.aligned,
    }
    return Launch(_sgd_ema_kernel, (pointers.owner.shape[0],), arguments, warps)


def sgd_ema_triton(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`sgd_ema_` by the Triton kernel: on CUDA, or on the CPU under the interpreter."""
    arch = architecture(params[0].device)
    lists = [params, like(grads, params), momentum_buffers, ema_params]
    pointers = table(lists, launch_configuration(arch)[0])
    rate = lr.to(params[0].device, torch.float32, non_blocking=True)
    rates = (rate, momentum, weight_decay, ema_momentum)
    sgd_ema_launch(pointers, *rates, arch, grad_scale, found_inf).run()


@torch.library.custom_op(
    "fastmoco::sgd_ema_",
    mutates_args=("params", "momentum_buffers", "ema_params"),
    device_types="cpu",
)
def _sgd_ema(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if found_inf is not None and found_inf.item() < 0:
        return
    # ResNet-50, two cores: 24 ms; foreach SGD and lerp 73 ms. Channels-last gradients as they lie:
    # fused SGD would copy each, and would divide the caller's in place.
    if grad_scale is not None:
        grads = list(torch._foreach_div(grads, grad_scale))
    torch._fused_sgd_(
        flat(params),
        flat(like(grads, params)),
        flat(momentum_buffers),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr.item(),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )
    torch._foreach_lerp_(ema_params, params, 1.0 - ema_momentum)


@_sgd_ema.register_kernel("cuda")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    implementation = reference.sgd_ema_ if "sgd_ema_" in launch.replaced() else sgd_ema_triton
    implementation(
        params,
        grads,
        momentum_buffers,
        ema_params,
        lr,
        momentum,
        weight_decay,
        ema_momentum,
        grad_scale,
        found_inf,
    )


@_sgd_ema.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    return None


def sgd_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One optimizer step on params and one momentum update of ema_params, in place.

    All lists are float32 tensors of pairwise equal shapes on one device. lr: a float, or a float32
    tensor with one element, which can change without a recompilation. A gradient scaler's
    `grad_scale` and `found_inf`, float32 with one element on the device, divide the gradients and,
    where `found_inf` is not 0, leave params and buffers as they are; a negative one leaves
    ema_params too. Raises ValueError naming what does not pair up.
    """
    written = {"params": params, "momentum_buffers": momentum_buffers, "ema_params": ema_params}
    check_lists(written, {"grads": grads})
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"expected lr with one element, got {tuple(lr.shape)}")
        rate = lr.detach()
    else:
        rate = torch.full((), lr, dtype=torch.float32, device=params[0].device)
    with torch.no_grad():
        _sgd_ema(
            [p.detach() for p in params],
            [g.detach() for g in grads],
            momentum_buffers,
            [e.detach() for e in ema_params],
            rate,
            momentum,
            weight_decay,
            ema_momentum,
            grad_scale,
            found_inf,
        )
