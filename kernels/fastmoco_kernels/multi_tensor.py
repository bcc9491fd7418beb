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


class _Entry(NamedTuple):
    table: Table
    host: tuple[Tensor, Tensor]
    """What `table.rows` and `table.owner` are copied from; pinned where they are on a GPU."""


_tables: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
# Tables of CUDA graphs, for good: a replay reads the device's half, and copies the host's again.
_captured: dict[int, _Entry] = {}
# Per layout one pair of pinned tensors for a capture, in which pinning memory is forbidden.
_spares: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _host_memory(
    device: torch.device, tensors: int, columns: int, programs: int
) -> tuple[Tensor, Tensor]:
    """Room for the rows and owners of a table; pinned for a GPU."""
    pin = device.type == "cuda"
    rows = torch.empty(tensors, columns, dtype=torch.int64, pin_memory=pin)
    return rows, torch.empty(programs, dtype=torch.int32, pin_memory=pin)


def table(lists: Sequence[Sequence[Tensor]], block: int) -> Table:
    """The table of these lists; cached by their addresses and sizes.

    Inside a capture of a CUDA graph raises `RuntimeError` where no call before it had lists of the
    same sizes: only outside can memory be pinned.
    """
    sizes = [t.numel() for t in lists[0]]
    addresses = [[t.data_ptr() for t in tensors] for tensors in lists]
    device = lists[0][0].device
    key = (device, block, *sizes, *(a for column in addresses for a in column))
    capturing = _capturing(device)
    entry = _tables.get(key)
    if entry is None:
        entry = _build(addresses, sizes, block, device, capturing)
    if capturing:
        # Its copy runs in replays only, so a table built here is of no use elsewhere.
        _captured[id(entry)] = entry
        return entry.table
    layout = (*entry.table.rows.shape, *entry.table.owner.shape)
    if (device, *layout) not in _spares:
        _spares[device, *layout] = _host_memory(device, *layout)
    _tables[key] = entry
    _tables.move_to_end(key)
    if len(_tables) > MAX_TABLES:
        _tables.popitem(last=False)
    return entry.table


def _build(
    addresses: list[list[int]], sizes: list[int], block: int, device: torch.device, capturing: bool
) -> _Entry:
    first, owner = plan(sizes, block)
    layout = (len(sizes), len(addresses) + 2, len(owner))
    host = _spares.pop((device, *layout), None) if capturing else _host_memory(device, *layout)
    if host is None:
        raise RuntimeError(
            f"no pinned memory is ready for an update of {len(sizes)} tensors inside a CUDA graph: "
            "run the update once before each capture."
        )
    host[0].copy_(torch.tensor([*addresses, sizes, first], dtype=torch.int64).T)
    host[1].copy_(torch.tensor(owner, dtype=torch.int32))
    rows, owners = (t.to(device, non_blocking=True) for t in host)
    aligned = all(a % 16 == 0 for column in addresses for a in column)
    return _Entry(Table(rows, owners, aligned), host)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():  # almost all, and far quicker to tell
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def check_lists(written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """Raise ValueError unless all lists pair up with the first of `written`, entry by entry.

    Equal lengths, shapes and devices, float32; what is written must also have equal, dense strides.
    """
    (name, model), *_ = written.items()
    if not model:
        raise ValueError(f"expected at least one tensor in {name}, got an empty list")
    device, shapes = model[0].device, [t.shape for t in model]
    for other, tensors in {**written, **read}.items():
        if len(tensors) != len(model):
            raise ValueError(f"{len(model)} {name} but {len(tensors)} {other}")
        laid_out, any_dtype = other in written, other == "shadows"
        for i, (a, b) in enumerate(zip(model, tensors, strict=True)):
            # Text is made only for an error: for 161 tensors it would cost as much as the EMA.
            fits = b.device == device and (a is b or b.shape == shapes[i])
            typed = any_dtype or b.dtype == torch.float32
            if fits and typed and (a is b or not laid_out or b.stride() == a.stride()):
                continue
            pair = f"{name}[{i}] {tuple(a.shape)}, {other}[{i}] {tuple(b.shape)}"
            if not fits:
                raise ValueError(f"{pair} on {b.device}: expected equal shapes and one device")
            if not typed:
                raise ValueError(f"{pair}: expected float32, got {b.dtype}")
            raise ValueError(f"{pair}: strides {a.stride()} and {b.stride()} differ")
    for i, t in enumerate(model):
        if not t.numel():
            raise ValueError(f"{name}[{i}] {tuple(t.shape)} is empty")
        if not _is_dense(t):
            raise ValueError(f"{name}[{i}] {tuple(t.shape)} has gaps: strides {t.stride()}")
