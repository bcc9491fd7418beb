"""A MoCo step written out by hand in float64, independent of everything in fastmoco.

BN groups are exact by construction: an encoder with plain BatchNorm2d is run on each group by
itself, and every other layer treats samples one by one. So a list of row groups describes any
number of ranks and any way to shuffle keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Groups = Sequence[Sequence[int]]

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)


def plain_double(encoder: nn.Module) -> nn.Module:
    """A float64 copy with `torch.nn.BatchNorm2d` wherever a subclass of it stands."""
    clone = copy.deepcopy(encoder).double()
    for parent in list(clone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(child.num_features, dtype=torch.float64)
                plain.load_state_dict(child.state_dict())
                setattr(parent, name, plain)
    return clone


class OracleMoCo:
    """State and update rule of algorithm 1 of arXiv 1911.05722, float64, one process."""

    def __init__(
        self,
        encoder: nn.Module,
        queue: Tensor,
        *,
        momentum: float,
        temperature: float,
        sgd_momentum: float,
        weight_decay: float,
    ) -> None:
        self.q = plain_double(encoder).train()
        self.k = plain_double(encoder).train()
        self.queue = queue.double().clone()
        self.ptr = 0
        self.m, self.t = momentum, temperature
        self.sgd_momentum, self.weight_decay = sgd_momentum, weight_decay
        self.velocity = [torch.zeros_like(p) for p in self.q.parameters()]
        self.grads: list[Tensor] = []

    def _encode(self, encoder: nn.Module, images: Tensor, groups: Groups) -> Tensor:
        """Unit features (B, C) in the order of `images`; BN sees one group at a time."""
        norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [(m.running_mean, m.running_var) for m in norms]
        moved: list[list[tuple[Tensor | None, Tensor | None]]] = []
        out: list[tuple[int, Tensor]] = []
        for rows in groups:
            for norm, (mean, var) in zip(norms, before, strict=True):
                # Each group starts from the same statistics, in tensors of its own.
                norm.running_mean, norm.running_var = copy.deepcopy((mean, var))
            pixels = (images[list(rows)].double() / 255 - MEAN) / STD
            features = encoder(pixels.permute(0, 3, 1, 2).contiguous())
            features = features / features.norm(dim=1, keepdim=True)
            out += zip(rows, features, strict=True)
            moved.append([(m.running_mean, m.running_var) for m in norms])
        for norm, *states in zip(norms, *moved, strict=True):
            norm.running_mean = torch.stack([mean for mean, _ in states]).mean(0)
            norm.running_var = torch.stack([var for _, var in states]).mean(0)
        return torch.stack([feature for _, feature in sorted(out, key=lambda pair: pair[0])])

    def step(
        self, im_q: Tensor, im_k: Tensor, query_groups: Groups, key_groups: Groups, lr: float
    ) -> float:
        """One step on the global batch; uint8 images (B, S, S, 3) in query order."""
        with torch.no_grad():
            for pk, pq in zip(self.k.parameters(), self.q.parameters(), strict=True):
                pk.copy_(self.m * pk + (1 - self.m) * pq)
            k = self._encode(self.k, im_k, key_groups)
        q = self._encode(self.q, im_q, query_groups)
        losses = []
        for i in range(len(q)):
            logits = torch.cat([(q[i] * k[i]).sum()[None], self.queue @ q[i]]) / self.t
            losses.append(torch.logsumexp(logits, 0) - logits[0])
        loss = torch.stack(losses).mean()
        self._sgd(loss, lr)
        for key in k:
            self.queue[self.ptr] = key
            self.ptr = (self.ptr + 1) % len(self.queue)
        return float(loss.detach())

    def _sgd(self, loss: Tensor, lr: float) -> None:
        params = list(self.q.parameters())
        self.grads = list(torch.autograd.grad(loss, params))
        with torch.no_grad():
            for p, g, v in zip(params, self.grads, self.velocity, strict=True):
                v.copy_(self.sgd_momentum * v + g + self.weight_decay * p)
                p.sub_(lr * v)

    def update_k(self) -> None:
        """The EMA that the next step would begin with: where fastmoco stands between two steps."""
        with torch.no_grad():
            for pk, pq in zip(self.k.parameters(), self.q.parameters(), strict=True):
                pk.copy_(self.m * pk + (1 - self.m) * pq)


class OracleEndToEnd(OracleMoCo):
    """Figure 2a of the paper: one encoder, keys of the global batch, gradients to both."""

    def step(
        self, im_q: Tensor, im_k: Tensor, query_groups: Groups, key_groups: Groups, lr: float
    ) -> float:
        """As above. All logits of the global batch stand in one matrix: no ranks, no gather."""
        q = self._encode(self.q, im_q, query_groups)
        k = self._encode(self.q, im_k, key_groups)
        losses = []
        for i in range(len(q)):
            logits = torch.stack([(q[i] * key).sum() for key in k]) / self.t
            losses.append(torch.logsumexp(logits, 0) - logits[i])
        loss = torch.stack(losses).mean()
        self._sgd(loss, lr)
        self.k = self.q
        return float(loss.detach())


class OracleMemoryBank(OracleMoCo):
    """Figure 2b of the paper: one encoder, and a stored feature of every sample in `queue`."""

    def step_on(
        self, im_q: Tensor, samples: list[int], negatives: list[int], groups: Groups, lr: float
    ) -> float:
        """One step on the global batch; samples: of each row, negatives: of all rows alike."""
        q = self._encode(self.q, im_q, groups)
        losses = []
        for i, sample in enumerate(samples):
            logits = torch.stack([self.queue[j] @ q[i] for j in [sample, *negatives]]) / self.t
            losses.append(torch.logsumexp(logits, 0) - logits[0])
        loss = torch.stack(losses).mean()
        self._sgd(loss, lr)
        with torch.no_grad():
            for i, sample in enumerate(samples):
                if sample not in samples[:i]:
                    mixed = self.m * self.queue[sample] + (1 - self.m) * q[i]
                    self.queue[sample] = mixed / mixed.norm()
        return float(loss.detach())
