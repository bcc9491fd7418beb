"""One training step: algorithm 1 of arXiv 1911.05722 on this rank.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed import World, average_gradients, gradient_sync, mean_over_ranks
from fastmoco.encoder import Embed
from fastmoco.machine.precision import Precision, choose_precision
from fastmoco.moco import MoCo
from fastmoco.optim import SGDWithEMA, build_ema, build_optimizer
from fastmoco.shuffle import Shuffle, build_shuffle
from fastmoco_kernels import InfoNCE, info_nce, info_nce_enqueue


class Views(Protocol):
    """Two views of the local samples, uint8 (N, S, S, 3) on the device."""

    @property
    def im_q(self) -> Tensor:
        """Views for encoder_q."""
        ...

    @property
    def im_k(self) -> Tensor:
        """Views for encoder_k."""
        ...


@dataclass
class Step:
    """Everything that one step touches, built once; `step(views, number)` runs it."""

    moco: MoCo
    embed_q: nn.Module
    embed_k: nn.Module
    shuffle: Shuffle
    optimizer: torch.optim.Optimizer
    ema: Callable[[], None] | None
    """Moves encoder_k, where the optimizer does not do that itself."""
    scaler: torch.amp.GradScaler
    temperature: float
    symmetric: bool
    precision: Precision

    def __call__(self, micro_batches: Sequence[Views], step: int) -> InfoNCE:
        """Advance both encoders, the queue and the cursor by one step.

        `micro_batches` are the parts of this rank's batch. They are all contrasted with the queue
        as it stands before the step; gradients add up, and queue and encoders move once. Returns
        the loss, averaged, and the ranks of the positives of all parts.
        """
        contrasts = self._contrasts(micro_batches, step)
        results, keys = [], []
        for index, (im_q, im_k, order) in enumerate(contrasts):
            is_last = index == len(contrasts) - 1
            with gradient_sync(self.embed_q, is_last):
                sent = self.shuffle.send(im_k, order)  # arrives while the queries are encoded
                q = self.embed_q(im_q)
                with torch.no_grad():
                    k = self.shuffle(self.embed_k, sent, order)
                keys.append(k.gathered)
                queue, ptr = self.moco.queue, self.moco.queue_ptr
                if is_last:
                    result = info_nce_enqueue(
                        q, k.local, torch.cat(keys), queue, ptr, self.temperature
                    )
                else:
                    result = info_nce(q, k.local, queue, self.temperature)
                self.scaler.scale(result.loss / len(contrasts)).backward()
            results.append(result)
        self.scaler.step(self.optimizer)  # in fp16 perhaps skipped
        self.scaler.update()
        if self.ema is not None:
            self.ema()
        self.optimizer.zero_grad(set_to_none=True)
        return _merge(results)

    def _contrasts(
        self, micro_batches: Sequence[Views], step: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(queries' images, keys' images, shuffle indices) of every contrast of the step."""
        contrasts = []
        for micro, views in enumerate(micro_batches):
            order = self.shuffle.indices(step * len(micro_batches) + micro)
            if views.im_q.is_cuda:  # from pinned memory the copy does not stall the host
                order = order.pin_memory().to(views.im_q.device, non_blocking=True)
            contrasts.append((views.im_q, views.im_k, order))
            if self.symmetric:
                contrasts.append((views.im_k, views.im_q, order))
        return contrasts


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
        self._lr = torch.zeros((), device=self.world.device)

    def __call__(self, micro_batches: Sequence[Views], step: int) -> InfoNCE:
        """Advance both encoders, the queue and the cursor by one step; see `Step`."""
        return self.run_graph(*self._contrasts(micro_batches, step)[0])

    def run_graph(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> InfoNCE:
        """The step on images and shuffle indices that are on the device."""
        optimizer = cast(SGDWithEMA, self.optimizer)
        # A tensor, because a new number would be a new graph; filling it does not stall the host.
        self._lr.fill_(optimizer.param_groups[0]["lr"])
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            result: InfoNCE = self._graph(im_q, im_k, order, self._lr, optimizer.momentum_buffers())
        return result

    def _whole(
        self, im_q: Tensor, im_k: Tensor, order: Tensor, lr: Tensor, buffers: list[Tensor]
    ) -> InfoNCE:
        params: list[Tensor] = list(self.moco.encoder_q.parameters())
        sent = self.shuffle.send(im_k, order)
        q = self.embed_q(im_q)
        with torch.no_grad():
            k = self.shuffle(self.embed_k, sent, order)
        result = info_nce_enqueue(
            q, k.local, k.gathered, self.moco.queue, self.moco.queue_ptr, self.temperature
        )
        grads = torch.autograd.grad(result.loss, params)
        with torch.no_grad():
            means = mean_over_ranks(grads, self.world)
            cast(SGDWithEMA, self.optimizer).update(params, means, buffers, lr)
        return InfoNCE(result.loss.detach(), result.rank, result.losses)


def _merge(results: Sequence[InfoNCE]) -> InfoNCE:
    """One result for the step: the mean loss and the ranks of all parts; detached."""
    return InfoNCE(
        torch.stack([r.loss.detach() for r in results]).mean(),
        torch.cat([r.rank for r in results]),
        torch.cat([r.losses for r in results]),
    )


def build_step(config: Config, moco: MoCo, world: World, *, compile_encoders: bool) -> Step:
    """The step of this run; precision, compilation and shuffle-BN strategy are fixed here.

    Raises `ConfigError` if the chosen optimizer is not available, `ValueError` for SyncBN with
    shuffle-BN.
    """
    strategy = config.shuffle_bn(world.size)
    if strategy != "none" and any(isinstance(m, nn.SyncBatchNorm) for m in moco.modules()):
        raise ValueError(
            "SyncBN gives every rank the same statistics, so shuffling keys between ranks cancels "
            "out: use plain or split BN, or set moco.shuffle_bn to none."
        )
    precision = choose_precision(config.run.precision, world.device)
    embed_q: nn.Module = Embed(moco.encoder_q, precision.dtype)
    embed_k: nn.Module = Embed(moco.encoder_k, precision.dtype)
    optimizer = build_optimizer(config, moco)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision.name == "fp16")
    build: Callable[..., Step] = Step
    one_graph = config.optim.accumulate == 1 and not config.moco.symmetric
    if (
        compile_encoders
        and one_graph
        and isinstance(optimizer, SGDWithEMA)
        and not scaler.is_enabled()
    ):
        build = partial(WholeStep, world=world)
    else:
        if compile_encoders:
            embed_q.compile(dynamic=False)
            embed_k.compile(dynamic=False)
        embed_q = average_gradients(embed_q, world)
    return build(
        moco=moco,
        embed_q=embed_q,
        embed_k=embed_k,
        shuffle=build_shuffle(
            strategy,
            world=world,
            local=config.local_batch_size(world.size),
            seed=config.run.seed,
        ),
        optimizer=optimizer,
        ema=build_ema(config, moco, optimizer),
        scaler=scaler,
        temperature=config.moco.temperature,
        symmetric=config.moco.symmetric,
        precision=precision,
    )
