"""The test instruments themselves: bfloat16 arithmetic is right, faults and races are caught."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastmoco_kernels.launch import jit
from tests.kernels.interpreter import watched


@jit
def _unmasked(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane, tl.load(x + lane), mask=lane < n)


@jit
def _masked(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane, tl.load(x + lane, mask=lane < n), mask=lane < n)


@jit
def _everyone_stores(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(y, tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0))


@jit
def _one_stores_what_all_load(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(y)
    if tl.program_id(0) == 1:
        tl.store(y, value + 1.0)


def test_watched_passes_clean_and_reports_broken_kernels() -> None:
    x, y = torch.randn(100), torch.zeros(100)
    with watched():
        _masked[(4,)](x, y, 100, BLOCK=32)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match="lanes load out of bounds"), watched():
        _unmasked[(4,)](x, y, 100, BLOCK=32)
    with pytest.raises(InterpreterError, match="stores what program"), watched():
        _everyone_stores[(3,)](x, y, 96, BLOCK=32)
    with pytest.raises(InterpreterError, match="stores what another program loads"), watched():
        _one_stores_what_all_load[(3,)](x, y, 96, BLOCK=32)


@jit
def _arithmetic(a_ptr, b_ptr, out_ptr, dot_ptr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, B)
    offset = lane[:, None] * B + lane[None, :]
    a, b = tl.load(a_ptr + offset), tl.load(b_ptr + offset)
    tl.store(out_ptr + offset, tl.where(a < b, a * b, a - b))
    tl.store(dot_ptr + offset, tl.dot(a, b))


def test_bfloat16_values_not_bits() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, dot = torch.empty_like(a), torch.empty(16, 16)
    _arithmetic[(1,)](a, b, out, dot, B=16)
    assert torch.equal(out, torch.where(a < b, a * b, a - b))
    torch.testing.assert_close(dot.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
