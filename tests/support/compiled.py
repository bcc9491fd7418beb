"""What tests of the kernels in C++ share: when they may be skipped, and their threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# For want of these a kernel cannot be tested. Any other reason, such as a source that does not
# compile or a wrong result, is a defect.
WANTS = ("no C++ compiler", "no AVX", "oneDNN has A")


def needs(why: str) -> pytest.MarkDecorator:
    """Skips where `why`, the `reason` of a kernel, is that this machine cannot have it."""
    return pytest.mark.skipif(why.startswith(WANTS), reason=why)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """That many compute threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
