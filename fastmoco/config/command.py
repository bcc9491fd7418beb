"""A command line whose refusals are one sentence, as everywhere in fastmoco."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any, NoReturn

from fastmoco.config.checks import MOST_SEED
from fastmoco.config.fields import ConfigError
from fastmoco.config.paths import spelled_out


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that prints no usage before an error; exit code 2.

    Options of type `Path` take `~` and `${HOME}`, which shells leave as they are after `=`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        print_any_name()
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """End with the sentence."""
        self.exit(2, f"fastmoco: {message} (see {self.prog} --help)\n")


def as_seed(text: str) -> int:
    """Type of an option for a seed: what every generator of random numbers takes."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if not 0 <= value <= MOST_SEED:
        raise argparse.ArgumentTypeError(f"{value} does not lie between 0 and {MOST_SEED}")
    return value


def print_any_name() -> None:
    """From now on names that are no valid text are printed with escapes instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _path(text: str) -> Path:
    try:
        return Path(spelled_out(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
