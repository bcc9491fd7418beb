"""Variables that have to be set before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastmoco.machine.environment import SPIN_COUNT, settle_environment
from fastmoco_kernels import processor

LINUX = sys.platform.startswith("linux")
ASK = """
import sys
import fastmoco
assert "torch" not in sys.modules, "fastmoco alone does not load torch"
import json, os, torch
from fastmoco_kernels import processor
print(json.dumps({
    "aten": torch.backends.cpu.get_cpu_capability(),
    "flags": sorted(processor.flags()),
    "best": processor.best(),
    "march": processor.march(),
    "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    "spins": os.environ.get("GOMP_SPINCOUNT"),
}))
"""


def asked(**more: str) -> dict[str, object]:
    """What a fresh process finds with these variables."""
    cleared = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ATEN_CPU_CAPABILITY", processor.CAP)
    environment = {k: v for k, v in os.environ.items() if k not in cleared} | more
    run = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(run.stdout)
    return found


def test_the_cap_holds_for_detection_aten_and_onednn() -> None:
    free, capped = asked(), asked(FASTMOCO_CPU="avx2")
    assert capped["aten"] in ("AVX2", free["aten"])
    assert capped["aten"] != "AVX512"
    assert capped["onednn"] == "AVX2"
    flags = capped["flags"]
    assert isinstance(flags, list)
    assert not [name for name in flags if name.startswith(("avx512", "amx"))]
    assert "FASTMOCO_CPU=avx2" in str(capped["best"])
    if free["flags"] == flags:  # an AVX2 machine already: nothing changes
        assert capped["march"] == free["march"] == ["-march=native"]
    else:
        assert "-mavx2" in str(capped["march"])
        assert "-march=native" not in str(capped["march"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, SPIN_COUNT if LINUX else None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_what_the_user_says_about_waiting_stays(said: dict[str, str], expected: str | None) -> None:
    environment = dict(said)
    settle_environment(environment)
    assert environment.get("GOMP_SPINCOUNT") == expected


@pytest.mark.skipif(not LINUX, reason="GNU OpenMP is Linux's")
def test_the_variable_is_there_before_torch_is() -> None:
    assert asked()["spins"] == SPIN_COUNT


def test_a_cap_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processor.CAP, "axv2")
    with pytest.raises(ValueError, match="'axv2'; it may be unset or avx2"):
        processor.flags()
