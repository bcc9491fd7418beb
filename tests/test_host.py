"""Allocator settings of the training process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from fastmoco.host import settle
line = settle(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    for _ in range(4):
        torch.ones(2**26, dtype=torch.uint8)
for _ in range(5):  # until the heap has settled
    touch()
before = faults()
touch()
print(faults() - before, "|", line)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    faults, line = run.stdout.split("|")
    assert int(faults) < 1000  # 64 MiB are 16384 pages
    assert "kept in the process" in line
