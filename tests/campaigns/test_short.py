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


@pytest.mark.parametrize(
    "command",
    [
        ("kill.py", "--kills", "2"),
        ("power.py", "--moments", "2"),
        ("disk.py", "--cases", "2"),
        ("damage.py", "--cases", "4"),
    ],
    ids=lambda command: command[0],
)
def test_a_campaign_in_short(command: tuple[str, ...]) -> None:
    program = [sys.executable, str(HERE / command[0]), *command[1:]]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert ", 0 failed," in done.stdout.splitlines()[-1]
