"""Layer-wise adaptive rate scaling (arXiv 1708.03888), for large global batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Trust coefficient of the paper (eta = 0.001) and of timm's `Lars`; the latter's epsilon.
TRUST = 1e-3
EPSILON = 1e-8


class LARS(torch.optim.SGD):
    """SGD with momentum whose step on each weight is scaled by the norms of weight and gradient.

    With g the gradient of a weight w and d the weight decay,
    r = TRUST |w| / (|g| + d |w| + EPSILON), or 1 where |w| or |g| is 0;
    v <- momentum v + r (g + d w); w <- w - lr v.
    As in timm's `Lars`, the learning rate stands outside of the momentum, as it does in torch's SGD
    (the paper puts it inside; the two differ only where it changes). Biases and the weights of
    batch norm, which have one dimension, get plain SGD: r = 1 and d = 0. The state is that of
    `torch.optim.SGD`: `momentum_buffer`, of the shape of its parameter, in one group. Norms stay on
    the device, so that the host waits for nothing.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("LARS takes no closure: gradients must already be there")
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        # Weights first, so that both kinds are slices of one list.
        params.sort(key=lambda p: p.dim() <= 1)
        if not params:
            return
        weights = [p for p in params if p.dim() > 1]
        grads: list[Tensor] = [p.grad for p in params]
        updates = _adapted(weights, grads[: len(weights)], group["weight_decay"])
        updates += grads[len(weights) :]
        buffers = []
        for p in params:
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(self.state[p]["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def _adapted(weights: list[Tensor], grads: list[Tensor], decay: float) -> list[Tensor]:
    """r (g + d w) for every weight, as new tensors."""
    if not weights:
        return []
    w_norms = torch.stack(torch._foreach_norm(weights))
    g_norms = torch.stack(torch._foreach_norm(grads))
    ratios = TRUST * w_norms / (g_norms + decay * w_norms + EPSILON)
    ratios = torch.where((w_norms > 0) & (g_norms > 0), ratios, 1.0)
    updates = list(torch._foreach_add(grads, weights, alpha=decay))
    torch._foreach_mul_(updates, list(ratios.unbind()))
    return updates
