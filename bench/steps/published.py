"""A MoCo step the way the published implementation runs it, with everything that it pays for.

Written from the description of the algorithm and of its costs, as the baseline for
`bench/throughput.py`: fp32 in NCHW memory, DDP that broadcasts its buffers (the queue among them)
before every forward, keys shuffled by gathering all images on every rank, an EMA that allocates new
parameters, a clone of the queue, N x (1+K) logits with a top-5 over them, and three values read
back to the host in every step. With equal weights and images it gives what `fastmoco.method.step`
gives.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

from fastmoco.network import resnet as ours
from fastmoco.network.batchnorm import SplitBatchNorm2d
from fastmoco.network.convolution import Conv2d

# What torchvision has in place of each of our modules; both have the same parameters and buffers.
PUBLISHED: dict[type[nn.Module], type[nn.Module]] = {
    ours.ResNet: resnet.ResNet,
    ours.BasicBlock: resnet.BasicBlock,
    ours.Bottleneck: resnet.Bottleneck,
    SplitBatchNorm2d: nn.BatchNorm2d,
    Conv2d: nn.Conv2d,
    ours.MaxPool2d: nn.MaxPool2d,
}


def as_published(encoder: nn.Module) -> nn.Module:
    """The same network, in place, in NCHW memory with torchvision's own forward."""
    for module in encoder.modules():
        module.__class__ = PUBLISHED.get(type(module), type(module))
    return encoder.to(memory_format=torch.contiguous_format)


class OfficialMoCo(nn.Module):
    """Two encoders and a queue (C, K); `forward` returns the logits (N, 1+K) and their labels (N,).

    `encoder` is the query encoder: a module from images (N, 3, S, S) to features (N, C).
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self, encoder: nn.Module, queue: Tensor, *, momentum: float, temperature: float
    ) -> None:
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder)
        self.encoder_k.requires_grad_(False)
        self.momentum = momentum
        self.temperature = temperature
        self.register_buffer("queue", queue.clone())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """One forward: EMA, keys of shuffled images, logits, enqueue. Images (N, 3, S, S) fp32."""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._move_key_encoder()
            shuffled, home = shuffle_batch(im_k)
            k = unshuffle_batch(F.normalize(self.encoder_k(shuffled), dim=1), home)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        self._enqueue(k)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def _move_key_encoder(self) -> None:
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        for of_k, of_q in pairs:
            of_k.data = of_k.data * self.momentum + of_q.data * (1.0 - self.momentum)

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        keys = gather(k)
        begin = int(self.queue_ptr)  # a host synchronization
        if self.queue.shape[1] % len(keys):
            raise ValueError(f"{len(keys)} keys do not divide a queue of {self.queue.shape[1]}")
        self.queue[:, begin : begin + len(keys)] = keys.T
        self.queue_ptr[0] = (begin + len(keys)) % self.queue.shape[1]


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """(N, ...) of every rank as (W * N, ...) in rank order."""
    parts = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def shuffle_batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of the shuffled global batch, and where every sample went: (W * N,)."""
    everyone = gather(images)
    order = torch.randperm(len(everyone), device=images.device)
    dist.broadcast(order, src=0)
    mine = order.view(dist.get_world_size(), -1)[dist.get_rank()]
    return everyone[mine], torch.argsort(order)


def unshuffle_batch(keys: Tensor, home: Tensor) -> Tensor:
    """The keys (N, C) that belong to this rank's queries."""
    mine = home.view(dist.get_world_size(), -1)[dist.get_rank()]
    return gather(keys)[mine]


@torch.no_grad()
def topk_percent(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of samples, in percent, whose label is the best or among the best five; (1,) each."""
    _, best = logits.topk(5, dim=1)
    hit = best.T.eq(labels.view(1, -1).expand(5, -1))
    top1, top5 = (hit[:k].reshape(-1).float().sum(0, keepdim=True) for k in (1, 5))
    scale = 100.0 / len(labels)
    return top1.mul_(scale), top5.mul_(scale)


class OfficialStep:
    """`step(im_q, im_k)` trains once and returns (loss, top-1 %, top-5 %) as Python floats.

    Needs an initialized process group, of one rank at least.
    """

    def __init__(self, moco: OfficialMoCo, *, lr: float, momentum: float, decay: float) -> None:
        device = next(moco.parameters()).device
        devices = [device.index] if device.type == "cuda" else None
        self.moco = moco
        self.wrapped = DistributedDataParallel(moco, device_ids=devices)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            moco.parameters(), lr=lr, momentum=momentum, weight_decay=decay
        )

    def __call__(self, im_q: Tensor, im_k: Tensor) -> tuple[float, float, float]:
        """One step on fp32 images (N, 3, S, S), normalized as the published loader hands them."""
        logits, labels = self.wrapped(im_q, im_k)
        loss: Tensor = self.criterion(logits, labels)
        top1, top5 = topk_percent(logits, labels)
        numbers = loss.item(), top1[0].item(), top5[0].item()  # three host synchronizations
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return numbers
