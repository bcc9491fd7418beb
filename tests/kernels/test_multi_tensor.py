"""Address tables under CUDA graphs, with a capture that is only said to be one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastmoco_kernels import multi_tensor
from fastmoco_kernels.multi_tensor import MAX_TABLES, table

BLOCK = 16


@pytest.fixture(autouse=True)
def no_tables_yet() -> Iterator[None]:
    with (
        mock.patch.dict(multi_tensor._tables, clear=True),
        mock.patch.dict(multi_tensor._captured, clear=True),
        mock.patch.dict(multi_tensor._spares, clear=True),
    ):
        yield


@contextmanager
def capture() -> Iterator[None]:
    """As inside a capture: CUDA refuses to pin memory."""
    refuse = mock.Mock(side_effect=AssertionError("pins memory in a capture"))
    with (
        mock.patch.object(multi_tensor, "_capturing", return_value=True),
        mock.patch.object(multi_tensor, "_host_memory", refuse),
    ):
        yield


def parameters() -> list[Tensor]:
    return [torch.zeros(20), torch.zeros(5)]


def fill_the_cache() -> list[list[Tensor]]:
    """More lists than the cache has room for; alive, so that all have addresses of their own."""
    others = [parameters() for _ in range(MAX_TABLES + 1)]
    for tensors in others:
        table([tensors], BLOCK)
    return others


def test_a_table_that_a_graph_uses_outlives_the_cache() -> None:
    used, unused = parameters(), parameters()
    kept = weakref.ref(table([used], BLOCK).rows)
    dropped = weakref.ref(table([unused], BLOCK).rows)
    with capture():
        assert table([used], BLOCK).rows is kept()
    fill_the_cache()
    gc.collect()
    assert dropped() is None
    assert kept() is not None


def test_new_addresses_in_a_capture_take_memory_that_was_pinned_before() -> None:
    warm, graph = parameters(), parameters()
    table([warm], BLOCK)
    with capture():
        made = table([graph], BLOCK)
    rows = weakref.ref(made.rows)
    want = [[graph[0].data_ptr(), 20, 0], [graph[1].data_ptr(), 5, 2]]
    assert made.rows.tolist() == want
    assert made.owner.tolist() == [0, 0, 1]
    del made
    fill_the_cache()
    gc.collect()
    kept = rows()
    assert kept is not None
    assert kept.tolist() == want  # nor is its memory given to anyone else


def test_a_table_made_in_a_capture_is_not_used_outside_where_it_was_never_copied() -> None:
    warm, graph = parameters(), parameters()
    table([warm], BLOCK)
    with capture():
        made = table([graph], BLOCK)
    assert table([graph], BLOCK).rows is not made.rows


def test_a_second_capture_needs_a_call_in_between_and_says_so() -> None:
    lists = [parameters() for _ in range(4)]
    with capture(), pytest.raises(RuntimeError, match="run the update once before each capture"):
        table([lists[0]], BLOCK)
    table([lists[0]], BLOCK)
    with capture():
        table([lists[1]], BLOCK)
        with pytest.raises(RuntimeError, match="run the update once before each capture"):
            table([lists[2]], BLOCK)
    table([lists[0]], BLOCK)
    with capture():
        table([lists[3]], BLOCK)
