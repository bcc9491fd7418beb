"""Momentum Contrast: two encoders and a queue of keys (arXiv 1911.05722, algorithm 1).

K queue length, C feature dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.network.encoder import build_encoder


class MoCo(nn.Module):
    """The state of a run that training changes: encoder_q, encoder_k, queue and queue_ptr.

    `encoder_k` starts as a copy of `encoder_q` and has no gradients; the optimizer moves it (see
    `fastmoco.method.optim.update`). `queue` (K, C) fp32 starts as random unit vectors, `queue_ptr`
    (1,) int64 at 0: the row that the next key overwrites. Attribute names are the official ones;
    the official queue is the transpose (see `fastmoco.run.checkpoint`).

    The two older mechanisms have one encoder, which both names stand for, and a queue of no rows;
    `bank` (n, C) fp32 is there for the memory bank only, with a row for each of n samples.
    """

    queue: Tensor
    queue_ptr: Tensor
    bank: Tensor

    def __init__(self, config: Config, bn_group_size: int) -> None:
        super().__init__()
        self.encoder_q = build_encoder(config.model, bn_group_size, config.data.channels)
        queue_mechanism = config.moco.mechanism == "queue"
        if queue_mechanism:
            self.encoder_k = build_encoder(config.model, bn_group_size, config.data.channels)
            self.encoder_k.load_state_dict(self.encoder_q.state_dict())
            self.encoder_k.requires_grad_(False)
        else:
            self.encoder_k = self.encoder_q
        queue = torch.randn(config.moco.queue_size if queue_mechanism else 0, config.model.dim)
        self.register_buffer("queue", F.normalize(queue, dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def parameter_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of encoder_q and, in the same order, of encoder_k. Buffers never move over."""
        return list(self.encoder_q.parameters()), list(self.encoder_k.parameters())

    def running_statistics(self) -> list[Tensor]:
        """Running means and variances of every BN layer of both encoders, fp32."""
        return [
            buffer
            for name, buffer in self.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        ]


def build_moco(config: Config, bn_group_size: int, device: torch.device) -> MoCo:
    """MoCo in training mode on `device`; initial weights depend on `run.seed` only."""
    torch.manual_seed(config.run.seed)
    moco = MoCo(config, bn_group_size).to(device)
    return moco.train()
