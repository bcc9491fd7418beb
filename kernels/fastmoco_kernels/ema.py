"""The momentum update of the key encoder over all its parameters at once.

    theta_k <- m theta_k + (1 - m) theta_q                          (equation 2 of arXiv 1911.05722)

It replaces the official per-parameter loop, which allocates two temporaries for every parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels import reference


@torch.library.custom_op("fastmoco::ema_", mutates_args=("targets",))
def _ema(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    reference.ema_(targets, sources, momentum)


@_ema.register_fake
def _(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    return None


def check_pairs(**lists: list[Tensor]) -> None:
    """Raise ValueError unless the lists have one length and, entry by entry, shape and device."""
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{len(first)} {first_name} but {len(tensors)} {name}")
        for i, (a, b) in enumerate(zip(first, tensors, strict=True)):
            if a.shape != b.shape or a.device != b.device:
                raise ValueError(
                    f"{first_name}[{i}] is {tuple(a.shape)} on {a.device}, "
                    f"{name}[{i}] is {tuple(b.shape)} on {b.device}"
                )


def ema_(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """targets[i] <- momentum * targets[i] + (1 - momentum) * sources[i], in place for all i.

    float32 tensors of equal shapes on one device. Raises ValueError naming what does not pair up.
    """
    check_pairs(targets=targets, sources=sources)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"expected a momentum from 0 to 1, got {momentum}")
    with torch.no_grad():
        _ema([t.detach() for t in targets], [s.detach() for s in sources], momentum)
