"""Which number format the encoders run in; the one place that knows what `run.precision` means."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmoco_kernels import processor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Compute capability from which CUDA devices multiply bf16.
_BF16_CAPABILITY = (8, 0)
# Time of a step in emulated bf16 over fp32: 5.9 s against 0.7 s, ResNet-18 at 32 px on AVX2.
_EMULATED = 8


@dataclass(frozen=True)
class Precision:
    """A resolved `run.precision`."""

    name: str
    """`bf16`, `fp16` or `fp32`: the autocast type of the encoders. Weights are fp32."""
    why: str
    """The reason in words, for start lines."""
    warning: str = ""
    """One sentence where the choice is a bad one on this device."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that autocast takes; fp32 means no autocast."""
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose_precision(asked: str, device: torch.device) -> Precision:
    """What `run.precision` means on this device; anything but `auto` is what it says."""
    if device.type == "cuda":
        return _on_cuda(asked, device)
    fast = processor.multiplies_bf16()
    extension = processor.best()
    if asked == "auto":
        if fast:
            return Precision("bf16", f"auto: this processor has {extension}")
        return Precision("fp32", f"auto: with {extension} bf16 is only emulated")
    if asked == "fp32" or (asked == "bf16" and fast):
        return Precision(asked, "run.precision")
    return Precision(
        asked,
        "run.precision",
        f"run.precision {asked} is emulated with {extension}, and takes about "
        f"{_EMULATED} times as long as fp32 there: use auto or fp32.",
    )


def _on_cuda(asked: str, device: torch.device) -> Precision:
    capability = torch.cuda.get_device_capability(device)
    fast, name = capability >= _BF16_CAPABILITY, f"sm_{capability[0]}{capability[1]}"
    if asked == "auto":
        if fast:
            return Precision("bf16", f"auto: {name} multiplies bf16")
        return Precision("fp16", f"auto: {name} is older than bf16, so fp16 with loss scaling")
    if asked == "bf16" and not fast:
        return Precision(
            asked,
            "run.precision",
            f"run.precision bf16 is emulated on {name}, and slow: use auto or fp16.",
        )
    return Precision(asked, "run.precision")
