"""Paths as people write them: `~`, `${HOME}`, `file://`, `shard-{000..099}.tar`, `*.tar`.

A path that exists is taken as it is, whatever signs are in its name.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator
from itertools import product
from urllib.parse import unquote_to_bytes

from fastmoco.config.fields import ConfigError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def spelled_out(path: str) -> str:
    """The path with the home folder and environment variables in their place.

    Raises `ConfigError` for a variable that is not set, a user who does not exist, and for what no
    file can be called.
    """
    if not path or os.path.lexists(path):
        return path
    return _possible(_spelled_out(path))


def _spelled_out(path: str) -> str:
    if path.startswith("file://"):
        path = os.fsdecode(unquote_to_bytes(os.fsencode(path[len("file://") :])))
        return path.removeprefix("localhost") if path.startswith("localhost/") else path

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(f"The path {path} names the variable {name}, which is not set.")
        return os.environ[name]

    path = _VARIABLE.sub(value, path)
    home = os.path.expanduser(path)
    if home == path and path.startswith("~"):
        raise ConfigError(f"The path {path} names the home folder of a user who does not exist.")
    return home


def _possible(path: str) -> str:
    try:
        os.lstat(path)
    except ValueError as error:
        raise ConfigError(f"The path {path!r} holds a NUL byte, which no path may.") from error
    except OSError as error:
        pattern = glob.has_magic(path) or "{" in path or "://" in path  # stands for other names
        if error.errno == errno.ENAMETOOLONG and not pattern:
            short = f"{path[:40]}...{path[-20:]}"
            raise ConfigError(f"The path {short} is too long for a name of a file.") from error
    return path


def matching(pattern: str) -> list[str]:
    """Every path that a pattern with braces, `*`, `?`, `[...]` or `**` stands for.

    Braces come in the order in which they are written, the rest is sorted. A path that is no
    pattern is returned whether it exists or not. Raises `ConfigError` for a pattern, or a part of
    one in braces, that nothing matches.
    """
    if os.path.lexists(pattern):
        return [pattern]
    found: dict[str, None] = {}
    for path in _braces(pattern):
        if os.path.lexists(path) or (path == pattern and not glob.has_magic(path)):
            found[path] = None
            continue
        names = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
        if not names:
            raise ConfigError(f"{path} does not exist{f', of {pattern}' * (path != pattern)}.")
        found.update(dict.fromkeys(names))
    return list(found)


def matching_words(pattern: str) -> list[str]:
    """The words that the braces of a pattern stand for, whether they exist or not."""
    return list(_braces(pattern))


def _braces(pattern: str) -> Iterator[str]:
    """The words that bash makes of `{a,b}` and `{01..10}`; the leftmost varies slowest."""
    for start, sign in enumerate(pattern):
        end = _closing(pattern, start) if sign == "{" else 0
        if end and (words := _words(pattern[start + 1 : end])):
            for word, rest in product(words, list(_braces(pattern[end + 1 :]))):
                yield pattern[:start] + word + rest
            return
    yield pattern


def _closing(pattern: str, start: int) -> int:
    """Where the brace that opens at start is closed; 0 if it is not."""
    depth = 0
    for at in range(start, len(pattern)):
        depth += (pattern[at] == "{") - (pattern[at] == "}")
        if depth == 0:
            return at
    return 0


def _words(inside: str) -> list[str]:
    """The words of one pair of braces; none where they are ordinary signs."""
    if span := _RANGE.fullmatch(inside):
        low, high, step = int(span[1]), int(span[2]), abs(int(span[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", end) for end in span.group(1, 2))
        width = max(len(span[1]), len(span[2])) if padded else 0
        numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
        return [f"{number:0{width}d}" for number in numbers]
    parts, depth = [""], 0
    for sign in inside:
        depth += (sign == "{") - (sign == "}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [word for part in parts for word in _braces(part)] if len(parts) > 1 else []
