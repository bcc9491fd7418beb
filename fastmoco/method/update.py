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
from fastmoco_kernels import ema_, sgd_ema_


def lr_at(config: Config, epoch: int) -> float:
    """Learning rate during `epoch` (from 0), constant within it, as published.

    cosine: lr * (1 + cos(pi * epoch / epochs)) / 2; step: lr * gamma^(milestones passed).
    """
    lr = config.resolved_lr()
    if config.optim.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / config.optim.epochs))
    return lr * config.optim.gamma ** sum(epoch >= m for m in config.optim.milestones)


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
            getattr(self, "found_inf", None),
        )

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

    Raises `ConfigError` if NVIDIA apex is asked for and not really there.
    """
    settings = config.optim
    lr, momentum, decay = config.resolved_lr(), settings.momentum, settings.weight_decay
    if settings.name == "sgd_ema":
        return SGDWithEMA(moco, lr=lr, momentum=momentum, decay=decay, ema=config.moco.momentum)
    params_q, _ = moco.parameter_pairs()
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    if settings.name != "sgd":
        make = _apex_optimizer({"apex_sgd": "FusedSGD", "apex_lars": "FusedLARS"}[settings.name])
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


def _apex_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """A fused optimizer of NVIDIA apex, told from its namesake on PyPI by what it contains."""
    try:
        module = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # the compiled extension that every fused optimizer calls
        found: Callable[..., torch.optim.Optimizer] = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optim.name asks for {name} of NVIDIA apex, which is not usable here ({error}): build "
            "apex from source with its CUDA extensions (the package called apex on PyPI is "
            "another project), or set optim.name to sgd_ema."
        ) from error
    return found
