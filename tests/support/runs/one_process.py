"""Runs a program as `python -m` does, but briefly: `python one_process.py -m bench.ablation ...`.

Contestants of a benchmark run in this process, which saves the start of Python and torch for each
of them, and the doctor measures no longer than it must.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

from bench.measure import contest
from fastmoco.doctor import speed


class InThisProcess:
    """Stands in for `bench.measure.contest.Process`."""

    def __init__(self, contestant: contest.Contestant) -> None:
        self.name = contestant.name
        module, function = contestant.factory.split(":")
        self._machine = getattr(import_module(module), function)(**contestant.arguments)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the process would answer."""
        return function(self._machine, *arguments)

    def window(self, steps: int, meter: object) -> contest.Window:
        """Without a meter."""
        return contest.timed(self._machine, steps)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.close()


def main() -> int:
    """Exit code of the program."""
    module, *arguments = sys.argv[2:]
    with (
        mock.patch.object(contest, "Process", InThisProcess),
        mock.patch.object(speed, "BUDGET_S", 0.1),
    ):
        program = import_module(module)
        if not hasattr(program, "main"):  # a package, of which `python -m` runs this
            program = import_module(f"{module}.__main__")
        return int(program.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
