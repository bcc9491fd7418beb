"""A kernel launch as a value: what runs on the device, what aot.py compiles, what tests inspect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

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

    def run(self) -> None:
        """Enqueue the launch on the current stream of its tensors' device; asynchronous."""
        tensors = (value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(next(tensors)):  # Triton launches on the current device
            self.kernel[self.grid](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
            )
