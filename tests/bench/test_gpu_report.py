"""The one command for a GPU box, rehearsed on the CPU: every part runs and stands in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import ROOT


def rehearse(report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    variables = {"REHEARSE": "1", "REPORT": str(report), "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_report.sh"), *options],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=540,
    )


@pytest.mark.slow
def test_every_part_of_the_report_runs(tmp_path: Path) -> None:
    done = rehearse(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, text
    for found in (
        *("every op equals its float64 reference", "## Tests on the device", "fastmoco"),
        *("our step / published step", "trace.json", "convolution", "this program, all off"),
        "0 parts failed",
    ):
        assert found in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_failing_part_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = rehearse(tmp_path / "report.md", "--config", "configs/absent.yaml")
    text = (tmp_path / "report.md").read_text()
    assert done.returncode == 1
    assert text.count("**exit code 2**") == 4  # doctor, throughput twice, ablation
    assert "4 parts failed" in text
