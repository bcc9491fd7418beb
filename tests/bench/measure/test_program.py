"""Every benchmark refuses to keep rows of a tree that differs from its commit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from bench.measure import program as shared
from bench.measure.program import chosen, options, parser
from fastmoco.config import ConfigError

SYNTHETIC = ["--data.source", "synthetic", "--run.device", "cpu"]
ROOT = ["--root", str(Path(__file__).parent)]
# By program: the function that measures, and other arguments.
PROGRAMS = {
    "ablation": ("compete", SYNTHETIC),
    "kernels": ("ema_race", ["--device", "cpu", "--only", "ema"]),
    "loader": ("write_shards", ROOT),
    "profiling": ("profile_step", SYNTHETIC),
    "scaling": ("rows", []),
    "throughput": ("measure", SYNTHETIC),
}


class MeasuredError(Exception):
    """Nothing is measured here: who tries has not been refused."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dirty_tree_may_be_measured_and_keeps_no_rows(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = import_module(f"bench.{name}")
    work, arguments = PROGRAMS[name]

    def measure(*_: object) -> None:
        raise MeasuredError

    monkeypatch.setattr(program, work, measure)
    monkeypatch.setattr(
        "bench.measure.rows.environment", lambda device: {"commit": "c0ffee", "dirty": True}
    )
    with pytest.raises(MeasuredError):
        program.main(arguments)
    capsys.readouterr()
    assert program.main([*arguments, "--publish"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"{name}: ")
    assert "commit first" in told.err
    assert not told.out


@pytest.mark.parametrize("name", ["ablation", "profiling", "throughput"])
def test_a_configuration_that_cannot_run_is_told_in_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SYNTHETIC, "--optim.global_batch_size", "0"]
    assert import_module(f"bench.{name}").main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_tells_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        import_module(f"bench.{name}").main(["--help"])
    assert end.value.code == 0
    assert "--publish" in capsys.readouterr().out


def test_options_of_the_configuration_are_not_taken_for_ours() -> None:
    made = parser("any", "")
    own = options(made, [*SYNTHETIC, "--windows", "3"], trains=True)
    assert (own.windows, own.steps, own.publish) == (3, 1, False)
    assert own.rest == SYNTHETIC
    assert own.config.data.source == "synthetic"
    with pytest.raises(SystemExit):
        made.parse_args(["--windows", "0"])
    with pytest.raises(ConfigError, match="--only knows a, b, not c"):
        chosen("a,c", ["a", "b"])
    assert chosen("", ["a", "b"]) == ["a", "b"]


def test_every_number_of_a_row_is_shown_below_who_was_timed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared_by_both = {"benchmark": "b", "case": {"batch": 8}, "ratios": {"a / b": [1.0, 2.0, 3.0]}}
    first = shared_by_both | {
        "contestant": "a",
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 3.0,
        "n": 9,
    }
    shared.show([first, first | {"contestant": "b", "gflop": 1234.5678, "peak": None}])
    numbers = [["p20_ms", "1.0"], ["p50_ms", "2.0"], ["p80_ms", "3.0"], ["n", "9"]]
    ratios = ["ratios", "{'a", "/", "b':", "[1.0,", "2.0,", "3.0]}"]
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line] == [
        *(["b:", "batch", "8"], ["a"], ratios, *numbers),
        *(["b"], ratios, *numbers, ["gflop", "1234.5678"]),
    ]
