"""The training step as one compiled graph.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmoco.data.batch import Batch
from fastmoco.machine.collectives import buckets, sum_over_ranks
from fastmoco.machine.ranks import World
from fastmoco.method.nonfinite import any_not_finite, telling
from fastmoco.method.optim.update import SGDWithEMA
from fastmoco.method.step import Step, StepResult
from fastmoco_kernels import info_nce_enqueue


class _Cast(torch.autograd.Function):
    """fp32 weights in another type, and their gradients back in fp32, each in one launch."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        return _cast_all(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast_all(grads, torch.float32)


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(made, list(tensors))
    return tuple(made)


@dataclass
class WholeStep(Step):
    """The same step as one graph, from the exchange to the update of both encoders.

    One micro-batch, one contrast and `SGDWithEMA` only, no gradient scaler. Why not DDP around a
    compiled encoder: see docs/distributed.md.
    """

    world: World
    backend: str | Callable[..., Any] = "inductor"

    def __post_init__(self) -> None:
        # Collectives start once their inputs are there and are waited for as late as possible:
        # the gather of keys beside the queries' forward, gradients beside the backward.
        options: dict[str, Any] = {
            "reorder_for_compute_comm_overlap": True,
            "reorder_for_compute_comm_overlap_passes": ["sink_waits_iterative"],
        }
        self._graph = torch.compile(
            self._whole,
            fullgraph=True,
            dynamic=False,
            backend=self.backend,
            options=options if self.backend == "inductor" else None,
        )
        device, ranks = self.world.device, self.world.size
        self._lr = torch.zeros((), device=device)
        # The update divides the summed gradients by it as it would by a gradient scaler's scale.
        self._ranks = torch.full((), float(ranks), device=device) if ranks > 1 else None

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Advance both encoders, the queue and the cursor by one step; see `Step`."""
        return self.run_graph(*self._contrasts(micro_batches, step)[0])

    def run_graph(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> StepResult:
        """The step on images and shuffle indices that are on the device."""
        self.set_rate()
        return self.launch(im_q, im_k, order)

    def set_rate(self) -> None:
        """Bring the optimizer's learning rate to the device."""
        # A tensor, because a new number would be a new graph; filling it does not stall the host.
        self._lr.fill_(self.optimizer.param_groups[0]["lr"])

    def launch(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> StepResult:
        """Everything of the step that the device does by itself, at the rate that was set."""
        buffers = cast(SGDWithEMA, self.optimizer).momentum_buffers()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            result: StepResult = self._graph(im_q, im_k, order, self._lr, buffers)
        return result

    def _cast(self, module: nn.Module) -> dict[str, Tensor]:
        """By name, the weights that autocast would cast one by one, cast a bucket at a time."""
        named = dict(module.named_parameters())
        names, params, dtype = list(named), list(named.values()), self.precision.dtype
        found: dict[str, Tensor] = {}
        if dtype == torch.float32:
            return found
        for bucket in buckets(params):
            wide = [i for i in bucket if params[i].ndim > 1]  # those of batch norm stay fp32
            narrow = _Cast.apply(dtype, *(params[i] for i in wide)) if wide else ()
            found |= dict(zip((names[i] for i in wide), narrow, strict=True))
        return found

    def _whole(
        self, im_q: Tensor, im_k: Tensor, order: Tensor, lr: Tensor, buffers: list[Tensor]
    ) -> StepResult:
        params: list[Tensor] = list(self.moco.encoder_q.parameters())
        kept = self.guard.keep()
        sent = self.shuffle.send(im_k, order)
        q = functional_call(self.embed_q, self._cast(self.embed_q), (im_q,))
        with torch.no_grad():
            weights = self._cast(self.embed_k)
            k = self.shuffle(
                lambda images: functional_call(self.embed_k, weights, (images,)), sent, order
            )
        result = info_nce_enqueue(
            q, k.local, k.gathered, self.moco.queue, self.moco.queue_ptr, self.temperature
        )
        grads = torch.autograd.grad(telling(result.loss), params)
        with torch.no_grad():
            sums = sum_over_ranks(grads, self.world)
            bad = any_not_finite(sums)
            left_out = -bad.float() if self.guard.skip else None
            update = cast(SGDWithEMA, self.optimizer).update
            update(params, sums, buffers, lr, self._ranks, left_out)
            self.guard.put_back(kept, bad)
        return StepResult(
            result.loss.detach(), result.rank, result.losses, q.detach()[None], k.local[None], bad
        )
