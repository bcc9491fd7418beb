"""The campaigns in their short form: a few cases of each, as the programs that they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="the disk with faults is preloaded into Linux programs and compiled by cc",
)


def test_killed_runs_end_as_undisturbed_ones() -> None:
    command = [sys.executable, str(HERE / "kill.py"), "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert ", 0 failed," in done.stdout.splitlines()[-1]
