"""Improvements of the step that can be switched off: what `bench.ablation` compares.

A switch is turned by the configuration or in `bench.steps.contestants`, where the program itself
has none. The step learns the same without any of them (`tests/bench/test_ablation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.config import Config
from fastmoco.machine.precision import choose_precision
from fastmoco.method.step import Step
from fastmoco.network.encoder import NormalizePixels
from fastmoco_kernels import InfoNCE, enqueue_
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from fastmoco_kernels.network import batch_norm_cpu

Run = Callable[[], object]
# Layers with a kernel of ours, by their names in `without`: what decides whether it runs.
LAYERS = {
    "fused_norm": "fastmoco.network.batchnorm.supports",
    "fused_norm_cuda": "fastmoco.network.batchnorm.supports_cuda",
    "convolutions": "fastmoco.network.convolution.convolution_fp32_cpu.supports",
    "weight_gradients": "fastmoco.network.convolution.convolution_cpu.supports",
}
# Names that `without` takes.
WITHOUT = ("channels_last", "fused_loss", "kept_memory", "uint8_input", *LAYERS)


class Switch(NamedTuple):
    """One improvement: its name, what stands in its place, and how it is switched off."""

    name: str
    instead: str
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def switches(config: Config, cuda: bool, compiled: bool) -> list[Switch]:
    """Those that make a difference here."""
    device = torch.device("cuda" if cuda else "cpu")
    asked = config.run.precision  # by name, without asking a device that may not be there
    precision = choose_precision(asked, device).name if asked == "auto" else asked
    eager_cpu = not (cuda or compiled)  # where our layers in C++ are
    fp32, bf16 = (eager_cpu and precision == name for name in ("fp32", "bf16"))
    plain_update = ("--optim.name", "sgd")
    found = {
        # CUDA tensors do not come from malloc.
        Switch("freed memory kept", "default malloc", (), ("kept_memory",)): not cuda,
        Switch("channels-last", "NCHW", (), ("channels_last",)): True,
        Switch(precision, "fp32", ("--run.precision", "fp32")): precision != "fp32",
        Switch("uint8 input", "fp32 images", (), ("uint8_input",)): True,
        Switch("fused batch norm", "ATen's, addition, ReLU", (), ("fused_norm",)): (
            eager_cpu and not batch_norm_cpu.reason()
        ),
        Switch("batch norm in Triton", "Inductor's", (), ("fused_norm_cuda",)): cuda and compiled,
        Switch("convolutions", "oneDNN's", (), ("convolutions",)): (
            fp32 and not convolution_fp32_cpu.reason()
        ),
        Switch("weight gradients", "oneDNN's", (), ("weight_gradients",)): (
            bf16 and not convolution_cpu.reason()
        ),
        Switch("fused loss", "N x K logits", (), ("fused_loss",)): True,
        Switch("fused update", "torch SGD, then EMA", plain_update): config.optim.name == "sgd_ema",
        Switch("torch.compile", "eager", ("--run.compile", "off")): compiled,
    }
    return [switch for switch, matters in found.items() if matters]


def switch_off(run: Run, step: Step, without: Sequence[str]) -> Run:
    """`run` without those improvements that the program itself has no switch for."""
    if "channels_last" in without:
        step.moco.to(memory_format=torch.contiguous_format)
    floats, contiguous = "uint8_input" in without, "channels_last" in without

    normalize = NormalizePixels.forward

    def pixels(self: NormalizePixels, images: Tensor) -> Tensor:
        ready = images.permute(0, 3, 1, 2) if floats else normalize(self, images)
        return ready.contiguous() if contiguous else ready

    def switched() -> None:
        with ExitStack() as patches:
            if floats or contiguous:
                patches.enter_context(mock.patch.object(NormalizePixels, "forward", pixels))
            patches.enter_context(layers_off([name for name in LAYERS if name in without]))
            if "fused_loss" in without:
                patches.enter_context(
                    mock.patch(f"{type(step).__module__}.info_nce_enqueue", eager_loss)
                )
            run()

    return switched


@contextmanager
def layers_off(names: Iterable[str] = tuple(LAYERS)) -> Iterator[None]:
    """ATen's operations inside, in the place of our kernels for these layers."""
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch(LAYERS[name], _nothing))
        yield


def _nothing(*_: object) -> bool:
    return False


def eager_loss(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> InfoNCE:
    """The loss as published: queue cloned, logits (N, 1+K) materialized, autograd through them."""
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone().detach().T], dim=1) / temperature
    losses = F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.long), reduction="none")
    rank = (logits[:, 1:] >= logits[:, :1]).sum(1)
    enqueue_(keys, queue, queue_ptr)
    return InfoNCE(losses.mean(), rank, losses.detach())
