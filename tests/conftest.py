"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch starts its threads: tests run several processes side by side, and OpenMP threads that
# outnumber the cores spin in barriers, which makes small operations ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support.ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, and listed, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo ranks."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four gloo ranks."""
    pool = Ranks(4)
    yield pool
    pool.close()
