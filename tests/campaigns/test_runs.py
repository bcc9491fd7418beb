"""What a campaign finds left in shared memory is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.campaigns import runs

# A killed process leaves its semaphore where its resource tracker is killed as well.
KILLED = """
import os, signal, sys
from multiprocessing import get_context, resource_tracker
from tests.campaigns import runs
if sys.argv[1] == "ours":
    runs.name_semaphores()
kept = get_context("spawn").Semaphore()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory has no folder here")
def test_a_semaphore_that_was_left_is_found_and_those_of_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(runs.PLACE, f"/campaign{os.getpid()}")  # no folder of it is needed
    before, files = runs.shared_memory(), set(os.listdir("/dev/shm"))
    for whose in ("others", "ours"):
        done = subprocess.run([sys.executable, "-c", KILLED, whose], cwd=runs.ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        left = runs.shared_memory() - before
        made = {name for name in set(os.listdir("/dev/shm")) - files if name.startswith("sem.")}
        assert left == (made if whose == "ours" else set())
        assert len(made) == 1
        for name in made:
            os.unlink(f"/dev/shm/{name}")
