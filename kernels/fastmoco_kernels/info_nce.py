"""InfoNCE over a queue: loss, gradient and rank in one pass, and the enqueue that may follow it.

    s_0 = q.k / T,  s_j = q.queue_j / T,  p = softmax(s)            (equation 1 of arXiv 1911.05722)
    loss  = logsumexp(s) - s_0
    dL/dq = (p_0 k + sum_j p_j queue_j - k) / (T N)

The gradient is the output of an attention whose keys and values are the queue, so the pass that
computes the loss computes it too. The backward only scales it and does not read the queue. This
replaces the official eager code (einsum, cat, cross_entropy, topk, clone of the queue).
N local batch, C feature dimension, K queue length, M gathered keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels import info_nce_cpu, launch, reference
from fastmoco_kernels.info_nce_launch import info_nce_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_C = 512


class InfoNCE(NamedTuple):
    """What one step wants to know about the pretext task."""

    loss: Tensor
    """() float32, mean over N; carries the gradient to q."""
    rank: Tensor
    """(N,) int64: queue logits that are not less than the positive, so top-1 is rank == 0 and top-5
    rank < 5. Ties (within rounding) and NaN count against it: a collapsed encoder has rank K."""
    losses: Tensor
    """(N,) float32 per sample, without a gradient."""


@torch.library.custom_op("fastmoco::info_nce", mutates_args=(), device_types="cpu")
def _info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return info_nce_cpu.info_nce(q, k, queue, temperature)


@_info_nce.register_kernel("cuda")
def _(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    if "info_nce" in launch.replaced():
        return reference.info_nce(q, k, queue, temperature)
    return info_nce_triton(q, k, queue, temperature)


@_info_nce.register_fake
def _(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    losses = q.new_empty(q.shape[0], dtype=torch.float32)
    return (
        losses,
        torch.empty_like(losses, dtype=torch.int64),
        q.new_empty(q.shape, dtype=torch.float32),
    )


@torch.library.custom_op(
    "fastmoco::info_nce_enqueue", mutates_args=("queue", "queue_ptr"), device_types="cpu"
)
def _info_nce_enqueue(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    result = info_nce_cpu.info_nce(q, k, queue, temperature)
    reference.enqueue_(keys, queue, queue_ptr)
    return result


@_info_nce_enqueue.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    if "info_nce_enqueue" in launch.replaced():
        result = reference.info_nce(q, k, queue, temperature)
        reference.enqueue_(keys, queue, queue_ptr)
        return result
    return info_nce_triton(q, k, queue, temperature, keys, queue_ptr)


@_info_nce_enqueue.register_fake
def _(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    losses = q.new_empty(q.shape[0], dtype=torch.float32)
    return (
        losses,
        torch.empty_like(losses, dtype=torch.int64),
        q.new_empty(q.shape, dtype=torch.float32),
    )


@torch.library.custom_op("fastmoco::enqueue_", mutates_args=("queue", "queue_ptr"))
def _enqueue(keys: Tensor, queue: Tensor, queue_ptr: Tensor) -> None:
    # Four small launches and no synchronization; the training step enqueues inside the loss.
    reference.enqueue_(keys, queue, queue_ptr)


@_enqueue.register_fake
def _(keys: Tensor, queue: Tensor, queue_ptr: Tensor) -> None:
    return None


# A custom op that writes to its inputs cannot have an autograd formula, so the gradient that the
# forward found is attached by this functional op, which both variants share.
@torch.library.custom_op("fastmoco::mean_with_gradient", mutates_args=())
def _mean_with_gradient(q: Tensor, losses: Tensor, dq: Tensor) -> Tensor:
    return losses.mean()


@_mean_with_gradient.register_fake
def _(q: Tensor, losses: Tensor, dq: Tensor) -> Tensor:
    return losses.new_empty(())


def _keep_gradient(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, _, dq = inputs
    ctx.save_for_backward(dq)
    ctx.dtype = q.dtype


def _scale_gradient(ctx, grad_loss):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradient of info_nce is a constant, it cannot be differentiated again"
        )
    (dq,) = ctx.saved_tensors
    return (grad_loss * dq).to(ctx.dtype), None, None


_mean_with_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> None:
    shapes = f"q {_shape(q)}, k {_shape(k)}, queue {_shape(queue)}"
    if q.ndim != 2 or q.shape != k.shape or queue.ndim != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(f"expected q and k (N, C) and queue (K, C), got {shapes}")
    if min(*q.shape, *queue.shape) < 1 or q.shape[1] > MAX_C or queue.shape[0] >= 2**31:
        raise ValueError(f"expected N >= 1, 1 <= C <= {MAX_C}, 1 <= K < 2**31, got {shapes}")
    if any(t.dtype not in DTYPES for t in (q, k, queue)):
        raise ValueError(f"expected float32, float16 or bfloat16, got {shapes}")
    if k.device != q.device or queue.device != q.device:
        raise ValueError(f"expected one device, got {shapes}")
    if not queue.is_contiguous():
        raise ValueError(f"the queue must be contiguous, got strides {queue.stride()} of {shapes}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"expected a positive finite temperature, got {temperature} for {shapes}")


def _check_ring(keys: Tensor, queue: Tensor, queue_ptr: Tensor) -> None:
    shapes = f"keys {_shape(keys)}, queue {_shape(queue)}, queue_ptr {_shape(queue_ptr)}"
    if keys.ndim != 2 or queue.ndim != 2 or keys.shape[1] != queue.shape[1]:
        raise ValueError(f"expected keys (M, C) and queue (K, C), got {shapes}")
    if not 1 <= keys.shape[0] <= queue.shape[0]:
        raise ValueError(f"expected between 1 and K keys, got {shapes}")
    if queue_ptr.shape != (1,) or queue_ptr.dtype != torch.int64:
        raise ValueError(f"expected queue_ptr (1,) int64, got {shapes}")
    if any(t.dtype not in DTYPES for t in (keys, queue)):
        raise ValueError(f"expected float32, float16 or bfloat16, got {shapes}")
    if keys.device != queue.device or queue_ptr.device != queue.device:
        raise ValueError(f"expected one device, got {shapes}")
    if not queue.is_contiguous():
        raise ValueError(f"the queue must be contiguous, got strides {queue.stride()} of {shapes}")


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> InfoNCE:
    """Loss of q (N, C) against its positives k (N, C) and the negatives queue (K, C).

    Inputs are float32, float16 or bfloat16 and may differ; k and queue are constants. Rows are
    expected to be L2-normalized. Products are float32 on the CPU; on CUDA they are in q's dtype, to
    which k and the queue are rounded, and sums are float32. A queue that is not contiguous is
    refused, q and k may be strided. NaN or Inf in an input reaches the loss. The gradient can be
    taken once. Raises ValueError naming the shapes.

    Other mechanisms of the papers by the same op: symmetric, q = cat(q1, q2) and k = cat(k2, k1);
    memory bank, k and queue are rows taken from the bank.
    """
    _check_loss(q, k, queue, temperature)
    losses, rank, dq = _info_nce(
        q.detach().contiguous(), k.detach().contiguous(), queue.detach(), temperature
    )
    return InfoNCE(_mean_with_gradient(q, losses, dq), rank, losses)


def info_nce_enqueue(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> InfoNCE:
    """`info_nce`, then keys (M, C), M <= K, replace the oldest rows of the queue in place.

    queue_ptr (1,) int64 from 0 to K - 1, on the same device, is where the first key goes; it
    advances by M modulo K, without a host synchronization.
    The loss sees the old queue only. Raises ValueError naming the shapes.
    """
    _check_loss(q, k, queue, temperature)
    _check_ring(keys, queue, queue_ptr)
    losses, rank, dq = _info_nce_enqueue(
        q.detach().contiguous(),
        k.detach().contiguous(),
        keys.detach().contiguous(),
        queue.detach(),
        queue_ptr,
        temperature,
    )
    return InfoNCE(_mean_with_gradient(q, losses, dq), rank, losses)


def enqueue_(keys: Tensor, queue: Tensor, queue_ptr: Tensor) -> None:
    """Write keys (M, C), M <= K, into the ring queue (K, C) at queue_ptr (1,) int64; advance it.

    No host synchronization. Raises ValueError naming the shapes.
    """
    _check_ring(keys, queue, queue_ptr)
    _enqueue(keys.detach().contiguous(), queue.detach(), queue_ptr)
