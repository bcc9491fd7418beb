"""Weight decay, momentum SGD and the momentum update of the key encoder in one pass.

    buf <- momentum buf + (g + weight_decay p)
    p   <- p - lr buf                                    (torch.optim.SGD, dampening 0, no Nesterov)
    ema <- m ema + (1 - m) p                            (equation 2 of arXiv 1911.05722)

Updating the key encoder here equals updating it before the next key forward, because nothing
changes p in between. It replaces `torch.optim.SGD.step()` followed by `ema_`: 28 bytes per
fp32 parameter instead of 32. A buffer of zeros makes the first step that of `torch.optim.SGD`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels import reference
from fastmoco_kernels.ema import check_pairs


@torch.library.custom_op(
    "fastmoco::sgd_ema_", mutates_args=("params", "momentum_buffers", "ema_params")
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
) -> None:
    reference.sgd_ema_(
        params, grads, momentum_buffers, ema_params, lr, momentum, weight_decay, ema_momentum
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
) -> None:
    """One optimizer step on params and one momentum update of ema_params, in place.

    All lists are float32 tensors of pairwise equal shapes on one device. lr may be a float or a
    float32 tensor with one element; inside torch.compile give a tensor, which can change without a
    recompilation. Raises ValueError naming what does not pair up.
    """
    check_pairs(
        params=params, grads=grads, momentum_buffers=momentum_buffers, ema_params=ema_params
    )
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"expected lr with one element, got {tuple(lr.shape)}")
        rate = lr.detach()
    else:
        rate = torch.full((), lr, dtype=torch.float32)
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
        )
