"""The one command for a GPU box, rehearsed on the CPU: every part runs and stands in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench import ablation, throughput
from bench.measure.rows import ROOT
from fastmoco.doctor import __main__ as doctor

ABSENT = ["--config", "configs/absent.yaml"]
# Refuses what is asked with the absent file, as the programs do, and does nothing else.
REFUSING = """
case "$*" in *absent.yaml*) echo "no such file"; exit 2 ;; esac
echo "asked to run $*"
"""


def rehearse(folder: Path, python: str, *options: str) -> tuple[int, str]:
    """Exit code and report of the script where `python` is what a shell runs for Python."""
    program, report = folder / "python", folder / "report.md"
    program.write_text(f"#!/bin/sh\n{python}\n")
    program.chmod(0o755)
    variables = {"REHEARSE": "1", "REPORT": str(report), "PYTHON": str(program)}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_report.sh"), *options],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    return done.returncode, report.read_text()


def test_every_part_of_the_report_runs(tmp_path: Path) -> None:
    brief = ROOT / "tests" / "support" / "one_process.py"
    code, text = rehearse(tmp_path, f'exec "{sys.executable}" "{brief}" "$@"')
    assert code == 0, text
    for found in (
        *("every op equals its float64 reference", "## Tests on the device", "fastmoco"),
        *("our step / published step", "trace.json", "convolution", "this program, all off"),
        "0 parts failed",
    ):
        assert found in text
    assert "Traceback" not in text


def test_a_failing_part_is_told_and_the_others_run(tmp_path: Path) -> None:
    code, text = rehearse(tmp_path, REFUSING, *ABSENT)
    assert code == 1
    assert text.count("**exit code 2**") == 4  # doctor, throughput twice, ablation
    assert text.count("asked to run") == 2  # tests and kernels
    assert "4 parts failed" in text


@pytest.mark.parametrize("program", [doctor.main, throughput.main, ablation.main])
def test_an_absent_configuration_has_the_exit_code_that_the_report_tells(
    program: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(ABSENT) == 2
    assert "absent.yaml" in capsys.readouterr().err
