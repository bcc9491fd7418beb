"""Two additions to Triton's CPU interpreter: bfloat16 arithmetic, and a memory and race checker.

Triton 3.8 keeps bfloat16 as uint16 bit patterns and, except for loads, stores and widening casts,
calculates with the bits as if they were integers. `install_bfloat16` makes every operation that
the kernels use work on values, rounded to nearest even. `watched` checks the lanes that a launch
touches: programs run one after another here, so a race never shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

Array = NDArray[Any]
Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def widen(bits: Array) -> Array:
    """bfloat16 bit patterns (uint16) to the float32 values they stand for."""
    values: Array = (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
    return values.reshape(np.shape(bits))


def narrow(values: Array) -> Array:
    """float32 to bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(np.ascontiguousarray(values, dtype=np.float32))
    result: Array = np.where(nan, np.uint16(0x7FC0), rounded)
    return result.reshape(np.shape(values))


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Any) -> Array:
    data: Array = handle.data
    return widen(data) if _is_bf16(handle) and data.dtype == np.uint16 else data


def _elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
    """binary_op, unary_op and ternary_op: handles first, then the numpy operation."""

    def operation(self: Any, *operands: Any) -> Any:
        *handles, op = operands
        if not _is_bf16(handles[-1]) or op in BITWISE or op is np.where:
            return original(self, *operands)
        result = op(*(_values(handle) for handle in handles))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    return operation


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
        if not (_is_bf16(a) or _is_bf16(b)):
            return original(self, a, b, acc, *precision)
        product = np.matmul(_values(a), _values(b), dtype=np.float32)
        return Handle(product + acc.data, acc.dtype.scalar)

    return create_dot


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """cast_impl and create_fp_to_fp: a handle, the destination type, maybe a rounding mode."""

    def cast(self: Any, source: Any, destination: Any, *mode: Any) -> Any:
        scalar = destination.scalar
        if (scalar == tl.bfloat16) == _is_bf16(source):
            return original(self, source, destination, *mode)
        if scalar == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), scalar)
        return Handle(widen(source.data).astype(interpreter._get_np_dtype(destination)), scalar)

    return cast


def install_bfloat16() -> None:
    """Patch the interpreter of this process for good. Calling it twice does nothing more."""
    if getattr(Builder, "computes_bfloat16", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(Builder, name, _elementwise(getattr(Builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(Builder, name, _cast(getattr(Builder, name)))
    Builder.create_dot = _dot(Builder.create_dot)
    Builder.computes_bfloat16 = True


class MemoryFault(AssertionError):
    """A lane outside every tensor of the launch, or two programs in conflict over an address."""


class _Watch:
    """What the launches inside `watched` have touched. Conflicts count within one launch only."""

    def __init__(self, hidden: Sequence[Tensor]) -> None:
        self.hidden = [_extent(t) for t in hidden]
        self.ranges: list[tuple[int, int]] = []
        self.writer: dict[int, Any] = {}
        self.readers: dict[int, set[Any]] = {}
        self.programs: set[Any] = set()

    def begin(self, arguments: Any) -> None:
        self.ranges = self.hidden + [_extent(t) for t in _tensors(arguments)]
        self.writer, self.readers = {}, {}

    def touch(self, pointers: Any, mask: Array, kind: str) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, np.shape(mask))
        lanes = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)]
        lanes = np.unique(lanes.astype(np.uint64))
        inside = np.zeros(lanes.shape, bool)
        for low, high in self.ranges:
            inside |= (lanes >= low) & (lanes + np.uint64(width) <= high)
        program = interpreter.interpreter_builder.grid_idx
        self.programs.add(program)
        if not inside.all():
            raise MemoryFault(f"program {program}: {(~inside).sum()} lanes {kind} out of bounds")
        for lane in lanes.tolist():
            self._conflict(lane, program, kind)

    def _conflict(self, lane: int, program: Any, kind: str) -> None:
        writer = self.writer.get(lane, program)
        if writer != program:
            raise MemoryFault(f"program {program} {kind}s what program {writer} stores")
        if kind == "load":
            self.readers.setdefault(lane, set()).add(program)
        else:
            if self.readers.get(lane, set()) - {program}:
                raise MemoryFault(f"program {program} stores what another program loads")
            self.writer[lane] = program


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and byte after the last one of the view."""
    low = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (last + 1) * tensor.element_size()


def _tensors(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            if tensor.numel():
                yield tensor


@contextmanager
def watched(*hidden: Tensor) -> Iterator[_Watch]:
    """Raise MemoryFault at an access outside the tensors of a launch, or where programs conflict.

    hidden: tensors that a kernel reaches through addresses in a table and not as an argument.
    """
    watch = _Watch(hidden)
    grid = interpreter.GridExecutor
    load, store, begin = (
        Builder.create_masked_load,
        Builder.create_masked_store,
        grid._init_args_hst,
    )

    def watched_begin(self: Any, args: Any, kwargs: Any) -> Any:
        copied = begin(self, args, kwargs)
        watch.begin((*copied[0], *copied[1].values()))
        return copied

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.touch(pointers, mask.data, "load")
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.touch(pointers, mask.data, "store")
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(grid, "_init_args_hst", watched_begin),
        mock.patch.object(Builder, "create_masked_load", watched_load),
        mock.patch.object(Builder, "create_masked_store", watched_store),
    ):
        yield watch
