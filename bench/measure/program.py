"""What all benchmark programs share: options, exit code, complaints, and what is shown.

A program is a function from its options to the rows that it measured. Rows are printed as they
come, and with --publish they are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from bench.measure.contest import Contestant, Result, contest
from bench.measure.rows import Row, append_rows, device_of, origin
from fastmoco.config import ConfigError, check, parse
from fastmoco.machine.gpu_meter import build_meter

Options = argparse.Namespace
"""Of a program: its own, `program`, `publish`, and where it trains `config`, `device`, `rest`."""
Words = Callable[[Options], list[str]]
NOT_SHOWN = ("benchmark", "case", "contestant", "environment", "config", "kernels")


def command(
    made: argparse.ArgumentParser, *, trains: bool = True, words: Words = lambda own: own.rest
) -> Callable[[Callable[[Options], Iterable[list[Row]]]], Callable[..., int]]:
    """Decorates what measures; it becomes a function of the command line that returns 0 or 2.

    Where the program `trains`, arguments that are not its own are those of `fastmoco.train`, and
    `words` makes the configuration's of them. 2 follows the sentence of a `ConfigError`.
    """

    def decorate(measure: Callable[[Options], Iterable[list[Row]]]) -> Callable[..., int]:
        def main(arguments: Sequence[str] | None = None) -> int:
            try:
                own = options(made, sys.argv[1:] if arguments is None else arguments, trains, words)
                where = origin(own.device, own.publish)
                for rows in measure(own):
                    show(rows)
                    if own.publish:
                        append_rows(own.program, rows, where)
            except ConfigError as error:
                complain(made.get_default("program"), str(error))
                return 2
            return 0

        return main

    return decorate


def parser(
    program: str, about: str | None, *, only: bool = True, windows: bool = True, steps: bool = True
) -> argparse.ArgumentParser:
    """A parser with those of the shared options that mean something in this program."""
    made = argparse.ArgumentParser(
        f"bench.{program}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else an option of the configuration could be taken for one of ours
    )
    made.set_defaults(program=program)
    if only:
        made.add_argument("--only", metavar="A,B", default="", help="some of what is measured")
    if windows:
        made.add_argument("--windows", type=_positive, default=20, help="timed windows of each")
    if steps:
        made.add_argument("--steps", type=_positive, help="of a window: 10 on CUDA, 1 on the CPU")
    made.add_argument(
        "--publish",
        action="store_true",
        help="append rows to bench/results; refused for a tree that differs from its commit",
    )
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def options(
    made: argparse.ArgumentParser,
    arguments: Sequence[str],
    trains: bool,
    words: Words = lambda own: own.rest,
) -> Options:
    """The options of a program. Raises `ConfigError` where a run on its ranks cannot be."""
    if not trains:
        own = made.parse_args(arguments)
        own.device = torch.device(getattr(own, "device", "cpu"))
        return own
    own, own.rest = made.parse_known_args(arguments)
    own.config = parse(words(own))
    check(own.config, getattr(own, "ranks", 1))
    own.device = device_of(own.config)
    if "steps" in own and not own.steps:  # long enough for the clock of the device
        own.steps = 10 if own.device.type == "cuda" else 1
    return own


def chosen(only: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `--only` names, in its order; all where it names none.

    Raises `ConfigError` for a name that is not known.
    """
    names = only.split(",") if only else list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"--only knows {', '.join(known)}, not {', '.join(unknown)}.")
    return names


def complain(program: str, sentence: str) -> None:
    """Say it in the program's name beside the rows, not among them."""
    print(f"{program}: {sentence}", file=sys.stderr)


def compete(
    own: Options, contestants: Sequence[Contestant], warmup: int | None = None
) -> dict[str, Result]:
    """The contest that the options ask for, with a meter of the GPU."""
    return contest(
        contestants,
        windows=own.windows,
        steps=own.steps,
        warmup=max(2, own.steps) if warmup is None else warmup,
        meter=build_meter(own.device, partial(complain, own.program)),
    )


def show(rows: Sequence[Row]) -> None:
    """Print the case of some rows, then who was timed and what was found."""
    for at, row in enumerate(rows):
        if not at or row["case"] != rows[at - 1]["case"]:
            case = ", ".join(f"{name} {value}" for name, value in row["case"].items())
            print(f"\n{row['benchmark']}: {case}")
        print(row.get("contestant", ""))
        for name, value in row.items():
            if name not in NOT_SHOWN and value is not None:
                print(f"    {name:32s}{value}")
    sys.stdout.flush()
