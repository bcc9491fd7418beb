"""Kernel launches as values, and the way to run an op by its reference instead of its kernels.

A `Launch` is what runs on the device, what aot.py compiles and what tests inspect.

Where triton is not installed (it is made for Linux only), every op runs by its eager reference
from the start. Elsewhere `preflight.check` tests every kernel on the device. The caller replaces an
op whose kernel is wrong, and training goes on, slower and with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # made for Linux only; elsewhere kernels are defined and never launched
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value, bfloat16=None, float16=None)

__all__ = ["HAS_TRITON", "Launch", "jit", "tl", "triton"]

HAS_TRITON = hasattr(triton, "compile")
jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""`triton.jit`, with a type that mypy accepts as a decorator."""


@dataclass(frozen=True)
class Launch:
    """One launch. Arguments hold tensors (real or meta), numbers and constexpr values by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    fused_multiply_add: bool = True
    """Whether the compiler may skip the rounding of a product that is added to something."""

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told beside the arguments."""
        names = ("num_warps", "num_stages", "enable_fp_fusion")
        values = (self.num_warps, self.num_stages, self.fused_multiply_add)
        return dict(zip(names, values, strict=True))

    def run(self) -> None:
        """Enqueue the launch on the current stream of its tensors' device; asynchronous."""
        tensors = (value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(next(tensors)):  # Triton launches on the current device
            self.kernel[self.grid](**self.arguments, **self.options)


def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; the CPU, which only interprets kernels, counts as that."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


OPS = (
    *("info_nce", "info_nce_enqueue", "ema_", "sgd_ema_", "max_pool", "batch_norm"),
    *("photometric", "crop_resize"),
)


NO_TRITON = (
    "triton is not installed (it is made for Linux), so the fused operations run by their "
    "references: right, but slower and with more memory."
)


_replaced: dict[str, str] = {} if HAS_TRITON else dict.fromkeys(OPS, "triton is not installed")


def use_reference(op: str, reason: str) -> None:
    """Run the CUDA form of `op` by its reference from now on. ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}, expected one of {', '.join(OPS)}")
    _replaced[op] = reason
    warnings.warn(
        f"fastmoco_kernels: the Triton kernel of {op} is switched off ({reason}). "
        "The eager reference runs instead: results are right, speed and memory are not.",
        RuntimeWarning,
        stacklevel=2,
    )


def use_kernel(op: str) -> None:
    """Undo `use_reference`."""
    _replaced.pop(op, None)


def replaced() -> dict[str, str]:
    """The ops that run by reference, with the reasons given."""
    return dict(_replaced)
