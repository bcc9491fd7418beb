"""Every benchmark refuses to keep rows of a tree that differs from its commit."""

from __future__ import annotations

from importlib import import_module

import pytest

SYNTHETIC = ["--data.source", "synthetic", "--run.device", "cpu"]
ROOT = ["--root", "nowhere"]
# By program: the function that measures, other arguments, the option that keeps rows.
PROGRAMS = {
    "ablation": ("run_part", SYNTHETIC, "--publish"),
    "index": ("write_files", [], "--publish"),
    "kernels": ("ema_race", ["--device", "cpu", "--only", "ema"], "--save"),
    "loader": ("check", ROOT, "--publish"),
    "profiling": ("profile_step", SYNTHETIC, "--publish"),
    "scaled_decoding": ("work", ROOT, "--publish"),
    "scaling": ("rows", [], "--save"),
    "threads": ("run", SYNTHETIC, "--publish"),
    "throughput": ("measure", SYNTHETIC, "--publish"),
}


class MeasuredError(Exception):
    """Nothing is measured here: who tries has not been refused."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dirty_tree_may_be_measured_and_keeps_no_rows(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = import_module(f"bench.{name}")
    work, arguments, keep = PROGRAMS[name]

    def measure(*_: object) -> None:
        raise MeasuredError

    monkeypatch.setattr(program, work, measure)
    monkeypatch.setattr("bench.measure.case.environment", lambda device: {"dirty": True})
    monkeypatch.setenv("FASTMOCO_CACHE", "")  # restored afterwards: one benchmark sets its own
    with pytest.raises(MeasuredError):
        program.main(arguments)
    capsys.readouterr()
    assert program.main([*arguments, keep]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"{name}: ")
    assert "commit first" in told.err
    assert not told.out


@pytest.mark.parametrize("name", ["ablation", "profiling", "threads", "throughput"])
def test_a_configuration_that_cannot_run_is_told_in_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SYNTHETIC, "--optim.global_batch_size", "0"]
    assert import_module(f"bench.{name}").main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
