"""The emergency exit: run an op's eager reference on CUDA instead of its Triton kernels.

Where triton is not installed (it is made for Linux only) that holds for every op from the start.

`preflight.check` finds out whether a kernel is right on the device at hand. Where it is not, the
caller replaces that op here and training goes on, slower and with a warning that cannot be missed.
"""

from __future__ import annotations

import warnings

from fastmoco_kernels.launch import HAS_TRITON

OPS = ("info_nce", "info_nce_enqueue", "ema_", "sgd_ema_")

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
