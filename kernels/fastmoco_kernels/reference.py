"""One eager implementation per op: what the op computes, and what runs where its kernel is wrong.

Losses are computed in float32, or in float64 when an input is float64, from the materialized
N x (1+K) logits. Nothing here reads a value back to the host, so all of it also runs on CUDA.
N local batch, C feature dimension, K queue length, M gathered keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Two logits tie when they differ by less than this times sum_c |q_c k_c|. A dot product of equal
# rows taken in two summation orders differs by a few units of 2**-24; without a margin a collapsed
# encoder, whose queue rows all equal its keys, would be scored by rounding noise.
TIE_MARGIN = 2.0**-18


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 1 of MoCo (arXiv 1911.05722) per sample, with its gradient.

    q, k (N, C) and queue (K, C) of any floating dtype. Returns losses (N,), rank (N,) int64 and
    dq (N, C), the gradient of `losses.mean()` with respect to q; floats in the compute dtype.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), queue.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    q, k, queue = q.to(dtype), k.to(dtype), queue.to(dtype)
    positive = (q * k).sum(1, keepdim=True)
    negative = q @ queue.T
    logits = torch.cat([positive, negative], 1) / temperature
    p = torch.softmax(logits, 1)[:, 1:]
    dq = (p @ queue - p.sum(1, keepdim=True) * k) / (temperature * q.shape[0])
    # An infinite queue entry can leave the loss finite (its logit is -inf) but never the gradient.
    losses = torch.logsumexp(logits, 1) - logits[:, 0] + 0.0 * dq.sum(1)
    threshold = positive - TIE_MARGIN * (q * k).abs().sum(1, keepdim=True)
    rank = (~(negative < threshold)).sum(1)  # written so that NaN counts against the positive
    return losses, rank, dq


def enqueue_(keys: Tensor, queue: Tensor, queue_ptr: Tensor) -> None:
    """Write keys (M, C) into the ring queue (K, C) at queue_ptr (1,) int64; advance it modulo K."""
    rows = torch.arange(keys.shape[0], device=queue.device) + queue_ptr
    queue.index_copy_(0, rows % queue.shape[0], keys.to(queue.dtype))
    queue_ptr.add_(keys.shape[0]).remainder_(queue.shape[0])


def ema_(
    targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: Sequence[Tensor] = ()
) -> None:
    """Equation 2 of MoCo in place: target <- momentum * target + (1 - momentum) * source.

    shadows, where there are any, receive the new targets rounded to their dtype.
    """
    for target, source in zip(targets, sources, strict=True):
        target.mul_(momentum).add_(source, alpha=1.0 - momentum)
    for shadow, target in zip(shadows, targets, strict=False):
        shadow.copy_(target)


def sgd_ema_(
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
    """`torch.optim.SGD` (dampening 0, no Nesterov) followed by `ema_`, in place. lr: () or (1,).

    Gradients are divided by `grad_scale`; where `found_inf` is not 0, only `ema_` moves anything,
    and where it is negative, nothing does.
    """
    for p, g, buf in zip(params, grads, momentum_buffers, strict=True):
        scaled = g.to(p.dtype) if grad_scale is None else g.to(p.dtype) / grad_scale
        new_buf = momentum * buf + (scaled + weight_decay * p)
        new_p = p - new_buf * lr.to(p.device)
        skip = found_inf != 0 if found_inf is not None else None
        buf.copy_(new_buf if skip is None else torch.where(skip, buf, new_buf))
        p.copy_(new_p if skip is None else torch.where(skip, p, new_p))
    before = [e.clone() for e in ema_params]
    ema_(ema_params, params, ema_momentum)
    if found_inf is not None:
        for e, old in zip(ema_params, before, strict=True):
            e.copy_(torch.where(found_inf < 0, old, e))


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(batch_norm(x) + residual)`, with `groups` runs of samples normalized by themselves.

    x, residual (N, C, H, W); the others (C,). Running statistics move once, in place.
    """
    # Weights of successive updates such that every group ends up with momentum / groups.
    shares = [(momentum / groups) / (1 - i * momentum / groups) for i in reversed(range(groups))]
    parts = x.chunk(groups) if training and groups > 1 else (x,)
    out = [
        F.batch_norm(part, running_mean, running_var, weight, bias, training, share, eps)
        for part, share in zip(parts, shares, strict=False)
    ]
    y = out[0] if len(out) == 1 else torch.cat(out)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def batch_norm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (groups, C) of runs of samples; moves what runs, in place.

    x (N, C, H, W); running_mean, running_var (C,), in whose dtype it is computed; counter () int64.
    """
    rows = x.to(running_mean.dtype).permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1])
    var, mean = torch.var_mean(rows, dim=1, correction=0)
    running_mean.lerp_(mean.mean(0), momentum)
    running_var.lerp_(var.mean(0) * (rows.shape[1] / (rows.shape[1] - 1)), momentum)
    counter.add_(1)
    return mean, var


def _by_group(per_group: Tensor, x: Tensor) -> Tensor:
    """(G, C) to (N, C, 1, 1)."""
    return per_group.repeat_interleave(x.shape[0] // len(per_group), 0)[:, :, None, None]


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """`relu((x - mean) * weight / sqrt(var + eps) + bias + residual)`, rounded once.

    x, residual (N, C, H, W); weight, bias (C,); mean, var (groups, C).
    """
    y = (x.to(mean.dtype) - _by_group(mean, x)) * _by_group(weight * torch.rsqrt(var + eps), x)
    y += bias[:, None, None]
    if residual is not None:
        y += residual
    y = F.relu(y) if relu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias through `batch_norm_apply` and the statistics.

    y, its output, is given where a residual was added in front of a ReLU; without y the second
    result is empty, and the gradient of a residual is dy.
    """
    groups, nhwc = len(mean), torch.channels_last
    g = dy.to(mean.dtype)
    inverse = torch.rsqrt(var + eps)
    d, scale = x.to(mean.dtype) - _by_group(mean, x), _by_group(weight * inverse, x)
    normal = d * _by_group(inverse, x)
    if y is not None:
        g = g.masked_fill(y <= 0, 0)
    elif relu:
        g = g.masked_fill(d * scale + bias[:, None, None] <= 0, 0)

    def sums(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(groups, -1, t.shape[1]).sum(1)

    of_bias, of_weight = sums(g), sums(g * normal)
    rows = x.numel() // (groups * x.shape[1])
    dx = g - _by_group(of_bias / rows, x) - normal * _by_group(of_weight / rows, x)
    dx = (dx * scale).to(x.dtype).contiguous(memory_format=nhwc)
    d_residual = x.new_empty(0)
    if y is not None:
        d_residual = g.to(x.dtype).contiguous(memory_format=nhwc)
    return dx, d_residual, of_weight.sum(0), of_bias.sum(0)


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """`F.max_pool2d` of x (N, C, H, W), and the tap that won in each window, i * kernel + j.

    The taps are uint8; both results are in channels-last memory.
    """
    y, flat = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    rows = torch.arange(y.shape[2], device=x.device)[:, None] * stride - padding
    columns = torch.arange(y.shape[3], device=x.device) * stride - padding
    taps = (flat // x.shape[3] - rows) * kernel + flat % x.shape[3] - columns
    nhwc = torch.channels_last
    return y.contiguous(memory_format=nhwc), taps.to(torch.uint8).contiguous(memory_format=nhwc)


def max_pool_backward(
    dy: Tensor, taps: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """Gradient (N, C, height, width) from dy, taps (N, C, P, Q), summed in fp32."""
    rows = torch.arange(dy.shape[2], device=dy.device)[:, None] * stride - padding
    columns = torch.arange(dy.shape[3], device=dy.device) * stride - padding
    flat = (taps.long() // kernel + rows) * width + taps.long() % kernel + columns
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dx = torch.zeros(*dy.shape[:2], height * width, dtype=dtype, device=dy.device)
    dx.scatter_add_(2, flat.flatten(2), dy.to(dtype).flatten(2))
    dx = dx.view(*dy.shape[:2], height, width).to(dy.dtype)
    return dx.contiguous(memory_format=torch.channels_last)
