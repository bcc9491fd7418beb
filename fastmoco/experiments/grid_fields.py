"""The entries of a grid file, taken one by one, each checked for what it may be.

Every refusal is a `ConfigError`: place, what stands there, and what may.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastmoco.config import ConfigError
from fastmoco.config.checks import MOST_SEED

T = TypeVar("T")
X = float | str
_MISSING = object()


class Fields:
    """A mapping of a file, whose entries are taken by name; what is left over is unknown."""

    def __init__(self, content: Any, place: str) -> None:
        self._left, self.place = dict(named_values(content, place)), place

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The entry, whatever it is; it must be there unless it has a default."""
        value = self._left.pop(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self.place} lacks {name}.")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Text, which may be empty only where the default is."""
        value = self.take(name, _MISSING if default is None else default)
        return "" if value == default == "" else text(value, f"{self.place}, {name}")

    def one_of(self, name: str, among: Sequence[str], default: str) -> str:
        """One of these words."""
        value = self.take(name, default)
        if value not in among:
            told = f"{name} is {shown(value)}, none of {', '.join(among)}"
            raise ConfigError(f"{self.place}: {told}.")
        return str(value)

    def several(self, name: str, one: Callable[[Any, str], T]) -> tuple[T, ...]:
        """A list, of which `one` checks each, given its place."""
        values, place = self.take(name), f"{self.place}, {name}"
        found = [one(value, place) for value in values] if isinstance(values, list) else []
        if not found or len(set(found)) < len(found):
            told = f"{name} must be a list, not empty, with each once, but is {shown(values)}"
            raise ConfigError(f"{self.place}: {told}.")
        return tuple(found)

    def named(self, name: str, *, optional: bool = False) -> dict[Any, Any]:
        """Names with values: at least one, or else `optional`."""
        value = self.take(name, {} if optional else _MISSING)
        if value == {} and not optional:
            raise ConfigError(f"{self.place}: {name} must hold a name with a value, but is empty.")
        return named_values(value, f"{self.place}, {name}")

    def end(self) -> None:
        """Raises `ConfigError` if anything is left."""
        if self._left:
            names = ", ".join(map(shown, self._left))
            raise ConfigError(f"{self.place} has {names}, unknown here.")


def shown(value: Any) -> str:
    """What a user recognizes, on one line and never long."""
    if isinstance(value, str) and value.isprintable() and value.strip() and len(value) <= 60:
        return value
    try:
        return str(value).lower() if isinstance(value, bool) else reprlib.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def named_values(value: Any, place: str) -> dict[Any, Any]:
    """The mapping that it must be."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place} must hold names with values, but is {shown(value)}.")
    return value


def text(value: Any, place: str) -> str:
    """A word or a number as one line of text."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # of such a number
            line = " ".join(str(value).split())
            if line and line.isprintable():
                return line
    told = f"{shown(value)} must be text that can be printed, or a number"
    raise ConfigError(f"{place}: {told}.")


def option_value(value: Any, place: str) -> str:
    """As on a command line: text, or some in brackets. What it means is its option's to check."""
    if isinstance(value, list):
        return f"[{', '.join(text(one, place) for one in value)}]"
    return text(value, place)


def on_axis(value: Any, place: str) -> X:
    """A number for what reads as one, else a word."""
    word = text(value, place)
    try:
        number = float(word)
    except ValueError:
        return word
    if not math.isfinite(number):
        raise ConfigError(f"{place}: {shown(word)} is no place on an axis: choose another.")
    return number


def whole(value: Any, place: str, least: int = 0) -> int:
    """A whole number that is not smaller than `least`, and that a seed may be."""
    if type(value) is not int or not least <= value <= MOST_SEED:
        told = f"{shown(value)} must be a whole number between {least} and {MOST_SEED}"
        raise ConfigError(f"{place}: {told}.")
    return value


def per_cent(value: Any, place: str) -> float | None:
    """A published number; None for a run that is said to have failed."""
    if value == "failed":
        return None
    try:
        number = float(text(value, place))
    except ValueError:  # ConfigError is one
        number = math.nan
    if not 0 <= number <= 100:
        raise ConfigError(
            f"{place}: {shown(value)} must be per cent from 0 to 100, or the word failed."
        )
    return number
