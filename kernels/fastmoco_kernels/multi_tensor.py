"""One launch over lists of tensors: a device table of pointers, and which program works on what.

L tensors per list, P lists that are walked together, B programs of BLOCK elements each. A table is
built once for a set of addresses and kept; building one costs a copy from pinned memory, never a
host synchronization.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.launch import jit, tl

MAX_TABLES = 32


class Table(NamedTuple):
    """Where the tensors are."""

    rows: Tensor
    """(L, P + 2) int64: P addresses, the number of elements, the first program of the tensor."""
    owner: Tensor
    """(B,) int32: the row on which a program works."""
    aligned: bool
    """Whether every address is a multiple of 16 bytes, so that loads can be vectors."""


@jit
def locate(rows, owner, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The table row of this program, its first element and the number of elements of the tensor."""
    pid = tl.program_id(0)
    row = rows + tl.load(owner + pid) * COLUMNS
    start = (pid - tl.load(row + COLUMNS - 1)) * BLOCK
    return row, start, tl.load(row + COLUMNS - 2)


@jit
def address(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer in a column. The compiler must be told of its alignment, it cannot see it."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def like(tensors: Sequence[Tensor], model: Sequence[Tensor]) -> list[Tensor]:
    """Read-only `tensors` laid out as `model`: themselves, or copies where the strides differ."""
    return [
        t if t.stride() == m.stride() else torch.empty_like(m, dtype=t.dtype).copy_(t)
        for t, m in zip(tensors, model, strict=True)
    ]


def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense tensors as they lie in memory, one-dimensional where they are not contiguous."""
    return [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in tensors]


def plan(sizes: Sequence[int], block: int) -> tuple[list[int], list[int]]:
    """First program of each tensor, and the tensor of each program, for `sizes` elements each."""
    first: list[int] = []
    owner: list[int] = []
    for index, size in enumerate(sizes):
        first.append(len(owner))
        owner += [index] * -(-size // block)
    return first, owner


_tables: OrderedDict[tuple[object, ...], tuple[Table, Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Table, Tensor, Tensor]] = []


def table(lists: Sequence[Sequence[Tensor]], block: int) -> Table:
    """The table of these lists; cached by their addresses and sizes."""
    sizes = [t.numel() for t in lists[0]]
    addresses = [[t.data_ptr() for t in tensors] for tensors in lists]
    key = (lists[0][0].device, block, *sizes, *(a for column in addresses for a in column))
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key][0]

    first, owner = plan(sizes, block)
    rows = torch.tensor([*addresses, sizes, first], dtype=torch.int64).T.contiguous()
    owners = torch.tensor(owner, dtype=torch.int32)
    device = lists[0][0].device
    if device.type == "cuda":
        rows, owners = rows.pin_memory(), owners.pin_memory()
    aligned = all(a % 16 == 0 for column in addresses for a in column)
    built = Table(rows.to(device, non_blocking=True), owners.to(device, non_blocking=True), aligned)
    _tables[key] = (built, rows, owners)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A replay of the graph copies from the pinned tensors again: they must outlive the cache.
        _captured.append(_tables[key])
    if len(_tables) > MAX_TABLES:
        _tables.popitem(last=False)
    return built
