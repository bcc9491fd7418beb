"""Learning-rate schedule and the update of both encoders.

encoder_q moves by SGD and then encoder_k by its EMA, in one pass or in two. The paper updates
encoder_k at the start of the next step from the same query weights; between the two nothing reads
encoder_k.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.method.moco import MoCo
from fastmoco.method.optim.lars import LARS
from fastmoco_kernels import ema_, sgd_ema_


def lr_at(config: Config, epoch: float) -> float:
    """Learning rate at `epoch`, counted from 0 in steps done / steps per epoch.

    With W = `optim.warmup_epochs`: before W it is lr * epoch / W, another one at every step, as in
    MoCo v3 (arXiv 2104.02057). From then on it is constant within an epoch, as published, with e
    the whole epochs done. cosine: lr * (1 + cos(pi * (e - W) / (epochs - W))) / 2, so that it
    starts at lr and ends near 0 with and without warm-up; step: a tenth for each milestone passed.
    """
    lr, optim = config.resolved_lr(), config.optim
    if epoch < optim.warmup_epochs:
        return lr * epoch / optim.warmup_epochs
    whole = math.floor(epoch)
    if optim.schedule == "cosine":
        done = (whole - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs)
        return lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return lr * 0.1 ** sum(whole >= m for m in optim.milestones)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class SGDWithEMA(torch.optim.SGD):
    """SGD with momentum and the EMA of encoder_k in one pass over the parameters.

    Gives what `torch.optim.SGD` followed by `ema_` gives, and shares its state dict. A step that a
    gradient scaler skips leaves encoder_q and moves encoder_k; whether it does is decided on the
    device.
    """

    left_out: Tensor | None = None
    """() bool: whether the next step is to leave everything as it is."""

    def __init__(self, moco: MoCo, *, lr: float, momentum: float, decay: float, ema: float) -> None:
        params_q, self._params_k = moco.parameter_pairs()
        super().__init__(params_q, lr=lr, momentum=momentum, weight_decay=decay)
        self._momentum, self._decay, self._ema = momentum, decay, ema
        # Asks the scaler for `grad_scale` and `found_inf`, which it sets during `step`.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of both encoders from the gradients of encoder_q."""
        if closure is not None:
            raise ValueError("SGDWithEMA takes no closure: gradients must already be there")
        params: list[Tensor] = self.param_groups[0]["params"]
        grads = [p.grad for p in params if p.grad is not None]
        if len(grads) != len(params):
            raise ValueError(
                f"{len(params) - len(grads)} of {len(params)} parameters lack a gradient"
            )
        self.update(
            params,
            grads,
            self.momentum_buffers(),
            self.param_groups[0]["lr"],
            getattr(self, "grad_scale", None),
            self._found(getattr(self, "found_inf", None)),
        )

    def _found(self, by_scaler: Tensor | None = None) -> Tensor | None:
        """`found_inf` of `sgd_ema_`."""
        if self.left_out is None:
            return by_scaler
        zero = torch.zeros_like(self.left_out, dtype=torch.float32)
        return torch.where(self.left_out, -1.0, zero if by_scaler is None else by_scaler)

    def momentum_buffers(self) -> list[Tensor]:
        """One per parameter, in order; zeros before the first step."""
        params: list[Tensor] = self.param_groups[0]["params"]
        for p in params:
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        lr: float | Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """The update itself, without the hooks of `step`, which torch.compile cannot trace."""
        sgd_ema_(
            params,
            grads,
            buffers,
            self._params_k,
            lr=lr,
            momentum=self._momentum,
            weight_decay=self._decay,
            ema_momentum=self._ema,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def build_optimizer(config: Config, moco: MoCo) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` chooses.

    Raises `ConfigError` if NVIDIA apex is asked for and is not there, or is wrong.
    """
    settings = config.optim
    lr, momentum, decay = config.resolved_lr(), settings.momentum, settings.weight_decay
    if settings.name == "sgd_ema":
        return SGDWithEMA(moco, lr=lr, momentum=momentum, decay=decay, ema=config.moco.momentum)
    params_q, _ = moco.parameter_pairs()
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    if settings.name == "lars":
        make = LARS
    elif settings.name == "apex_sgd":
        make = _apex_sgd(params_q[0].device)
    return make(params_q, lr=lr, momentum=momentum, weight_decay=decay)


def build_ema(
    config: Config, moco: MoCo, optimizer: torch.optim.Optimizer
) -> Callable[[], None] | None:
    """What moves encoder_k after `optimizer`, stepped or skipped; None if its `step` does that
    or there is one encoder only."""
    if isinstance(optimizer, SGDWithEMA) or moco.encoder_k is moco.encoder_q:
        return None
    params_q, params_k = moco.parameter_pairs()
    return lambda: ema_(params_k, params_q, config.moco.momentum)


def _apex_sgd(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """NVIDIA apex's fused SGD, told from its namesake on PyPI by what it contains, and verified."""
    try:
        module = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # the compiled extension that every fused optimizer calls
        found: Callable[..., torch.optim.Optimizer] = module.FusedSGD
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optim.name asks for FusedSGD of NVIDIA apex, which is not usable here ({error}): "
            "build apex from source with its CUDA extensions (the package called apex on PyPI is "
            "another project), or set optim.name to sgd_ema."
        ) from error
    if device.type != "cuda":
        raise ConfigError(
            f"optim.name is apex_sgd, which runs on CUDA only, and this run is on {device}: set "
            "optim.name to sgd_ema."
        )
    require_sgd(found, device)
    return found


def require_sgd(make: Callable[..., torch.optim.Optimizer], device: torch.device) -> None:
    """Raise `ConfigError` unless `make` builds an SGD that moves small tensors as torch's does.

    Three steps with momentum and weight decay, on a vector and on a weight in channels-last.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 33), (4, 3, 5, 5)]
    draws = [[torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(4)]
    draws = [[a, b.to(memory_format=torch.channels_last)] for a, b in draws]
    ends = []
    for build in (torch.optim.SGD, make):
        params = [t.clone().requires_grad_() for t in draws[0]]
        optimizer = build(params, lr=0.1, momentum=0.9, weight_decay=1e-2)
        for grads in draws[1:]:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    apart = float((ends[0] - ends[1]).abs().max())
    if not apart < 1e-5:
        raise ConfigError(
            f"optim.name is apex_sgd, but apex's FusedSGD differs by {apart:.1e} from torch's SGD "
            f"on {device}: build apex for this torch and GPU, or set optim.name to sgd_ema."
        )
