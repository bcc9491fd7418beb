"""A kernel launch as a value: what runs on the device, what aot.py compiles, what tests inspect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton

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
        """Enqueue the launch on the current stream; asynchronous."""
        self.kernel[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
        )
