"""What all benchmark programs share: their options, exit code, complaints, progress and table."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastmoco.config import Config, ConfigError, check, parse


def command(program: str) -> Callable[[Callable[[Sequence[str]], None]], Callable[..., int]]:
    """Decorates what a program does with its arguments, by default those of the command line.

    Returns the exit code: 0, or 2 after the sentence of a `ConfigError`.
    """

    def decorate(work: Callable[[Sequence[str]], None]) -> Callable[..., int]:
        def main(arguments: Sequence[str] | None = None) -> int:
            try:
                work(sys.argv[1:] if arguments is None else arguments)
            except ConfigError as error:
                complain(program, str(error))
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


def configured(
    made: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, Config, list[str]]:
    """The program's own options; from the rest, the configuration of a run; and the rest.

    Raises `ConfigError` where the configuration cannot run in one process.
    """
    own, rest = made.parse_known_args(arguments)
    config = parse(rest)
    check(config, 1)
    return own, config, rest


def chosen(only: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `--only` names, in its order; all where it names none.

    Raises `ConfigError` for a name that is not known.
    """
    names = only.split(",") if only else list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"--only knows {', '.join(known)}, not {', '.join(unknown)}.")
    return names


def steps_of(steps: int | None, device: torch.device) -> int:
    """Steps of a window: as asked for, or long enough for the clock of the device."""
    return steps or (10 if device.type == "cuda" else 1)


def complain(program: str, sentence: str) -> None:
    """Say it in the program's name beside the table, not in it."""
    print(f"{program}: {sentence}", file=sys.stderr)


def progress(windows: int) -> Callable[[int], None]:
    """A function of the windows done that keeps a counter on the terminal until all are."""
    return partial(_progress, windows=windows)


def _progress(done: int, windows: int) -> None:
    if sys.stderr.isatty():
        text = f"{done}/{windows} windows" if done < windows else ""
        print(f"\r{text:24s}\r", end="", file=sys.stderr, flush=True)


def show(caption: str, headers: Sequence[str], body: Sequence[Sequence[str]], note: str) -> None:
    """Print a table whose first column holds names and whose others hold numbers.

    On a terminal one line per name and number: ten columns do not fit 80 characters.
    """
    if sys.stdout.isatty():
        lines = [caption]
        for title, *values in body:
            lines += ["", title]
            lines += [f"  {a:34s}{b}" for a, b in zip(headers[1:], values, strict=True)]
        lines += ["", *textwrap.wrap(note, 80)]
    else:
        lines = [caption, "", *markdown(headers, body), "", note]
    print("\n".join(lines), flush=True)


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = "|---|" + "---:|" * (len(headers) - 1)
    top = f"| {' | '.join(headers)} |".replace("|  |", "| |")
    return [top, rule, *(f"| {' | '.join(line)} |" for line in body)]
