"""What the system grants, read from the system."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.machine import limits

ROOT = Path(__file__).resolve().parents[2]
ASK = "from fastmoco.machine.limits import files_left; print(files_left(100), files_left(10**6))"


def test_ranks_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = limits.shared_memory()
    assert alone is not None
    free = os.statvfs("/dev/shm")
    assert 0 < alone < free.f_blocks * free.f_frsize
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    shared = limits.shared_memory()
    assert shared is not None
    assert alone * 0.9 < 8 * shared < alone * 1.1  # others may take or give back some meanwhile


def test_no_such_place_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path / "none")
    assert limits.shared_memory() is None


def test_a_soft_limit_is_raised_as_far_as_the_hard_one_allows() -> None:
    """In a process of its own: a hard limit cannot be raised again."""

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 400))

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(
        command, env=environment, preexec_fn=narrow, capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    # 100 more than are open and than others may need; then as many as 400 leave.
    assert first == 100
    assert 100 < second < 400 - limits._OTHER_FILES
