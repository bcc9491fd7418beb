"""Who lives in a session of processes, to see what a program leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def begun(*arguments: str) -> subprocess.Popen[str]:
    """Python with these arguments, from this tree, in a session of its own; its words are kept."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )


def members(session: int) -> set[int]:
    """Live processes of a session, zombies aside."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def all_ended(session: int, seconds: float) -> bool:
    """Whether no process of it is left within so many seconds."""
    deadline = time.monotonic() + seconds
    while left := members(session):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return not left
