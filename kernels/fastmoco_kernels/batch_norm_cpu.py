"""Batch norm, residual addition and ReLU in one operation on the CPU, in channels-last memory.

ATen reads or writes an activation eight times in the forward of `relu(batch_norm(x) + residual)`
and nine times in its backward; batch_norm_cpu.cpp does with four and seven. It is compiled once per
machine, in about two seconds, by the C++ compiler that torch.compile uses too. Without one, or
where the result is not right, `reason` says so and the caller composes ATen operations instead.

N batch, G groups that are normalized by themselves, C channels, H W spatial.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels import reference

SOURCE = Path(__file__).with_name("batch_norm_cpu.cpp")
# -fopenmp without linking: the library must share the threads of torch, whose OpenMP is loaded.
COMPILE = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math"]
DTYPES = (torch.bfloat16, torch.float32)


class Arguments(ctypes.Structure):
    """The struct of the same name in batch_norm_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "dy", "dx", "d_residual")),
        *((name, ctypes.c_void_p) for name in ("grad_weight", "grad_bias", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("mean", "invstd", "running_mean", "running_var")),
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        *((name, ctypes.c_int64) for name in ("groups", "rows", "channels")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "relu", "training", "threads")),
    )


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled unless it is cached."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    target = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True
    )
    parts = [SOURCE.read_text(), version.stdout, target.stdout, platform.machine(), *COMPILE]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco"
    library = root / f"batch_norm_{name}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            code, linked = Path(folder) / "code.o", Path(folder) / "linked.so"
            for command in (
                [compiler, *COMPILE, "-c", str(SOURCE), "-o", str(code)],
                [compiler, "-shared", str(code), "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(linked, library)  # atomic: other ranks compile the same at the same time
    return library


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler (g++ or clang++) is installed"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"the compiler {compiler} failed: {(error.stderr or '').strip()[:200]}"
    except (OSError, RuntimeError) as error:  # no such compiler, no home, or an unknown symbol
        return None, f"the compiler's work cannot be used: {error}"
    for name in ("batch_norm_forward", "batch_norm_backward"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(Arguments)], None
    return library, ""


@cache
def reason() -> str:
    """Why the fused operation is not used on this machine; empty where it is.

    The first call compiles and compares one small case with ATen.
    """
    library, why = _loaded()
    if library is None:
        return why
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 24, 3, 3, generator=generator) for _ in range(2))
    x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    weight, bias = torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)
    outputs, statistics = [], []
    for function in (batch_norm_act, reference.batch_norm_act):
        moving = torch.zeros(24), torch.ones(24)
        outputs.append(function(x, residual, weight, bias, *moving, True, 0.1, 1e-5, 2, True))
        statistics.append(torch.cat(moving))
    apart = max(float((a - b).abs().max()) for a, b in (outputs, statistics))
    return "" if apart < 1e-5 else f"its result differs from ATen's by {apart:.1e}"


def supports(x: Tensor, residual: Tensor | None, weight: Tensor, groups: int) -> bool:
    """Whether `batch_norm_act` takes these: plain CPU tensors in channels-last memory."""
    if weight.dtype != torch.float32:
        return False
    for t in (x, residual):
        if t is not None and not (
            type(t) is Tensor
            and t.device.type == "cpu"
            and t.dtype in DTYPES
            and t.dtype == x.dtype
            and t.shape == x.shape
            and t.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
    return x.numel() > groups * x.shape[1] and not reason()


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(batch_norm(x) + residual)` for tensors that `supports` accepts.

    x, residual (N, C, H, W), bf16 or fp32; weight, bias, running_mean, running_var (C,) fp32. In
    training each of `groups` runs of N / groups samples is normalized by its own statistics, and
    the running ones move once, by the mean over groups (variances unbiased); otherwise the running
    ones are used and no gradient is recorded. Without `relu` there must be no residual.
    """
    out: Tensor = _BatchNormAct.apply(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, groups, relu
    )
    return out


def _arguments(x: Tensor, groups: int, **fields: Any) -> Arguments:
    pointers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
    return Arguments(
        x=x.data_ptr(),
        groups=groups,
        rows=x.numel() // (groups * x.shape[1]),
        channels=x.shape[1],
        is_bf16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **pointers,
    )


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        groups: int,
        relu: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        if training:
            mean, invstd = torch.empty(2, groups, x.shape[1])
        else:
            mean, invstd = running_mean, torch.rsqrt(running_var + eps)
        arguments = _arguments(
            x,
            groups,
            residual=residual,
            y=y,
            weight=weight,
            bias=bias,
            mean=mean,
            invstd=invstd,
            running_mean=running_mean,
            running_var=running_var,
            momentum=momentum,
            eps=eps,
            relu=relu,
            training=training,
        )
        library = _loaded()[0]
        assert library is not None
        library.batch_norm_forward(arguments)
        ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, invstd)
        ctx.groups, ctx.relu = groups, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, d_residual = torch.empty_like(x), None if y is None else torch.empty_like(x)
        grad_weight, grad_bias = torch.empty(2, x.shape[1])
        arguments = _arguments(
            x,
            ctx.groups,
            residual=y,  # not read: says that there was one
            y=y,
            dy=dy,
            dx=dx,
            d_residual=d_residual,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            weight=weight,
            bias=bias,
            mean=mean,
            invstd=invstd,
            relu=ctx.relu,
            training=True,
        )
        library = _loaded()[0]
        assert library is not None
        library.batch_norm_backward(arguments)
        return dx, d_residual, grad_weight, grad_bias, *[None] * 7
