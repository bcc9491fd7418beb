"""Files of several splits in one place: refused, as nobody wants to train on the test images.

The name of a file tells its split, as in `train-00000-of-00002.parquet` and `imagenet-train-0.tar`,
or else the folder that it is in, as in `default/train/0000.parquet`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching_words

_SPLIT = re.compile(
    r"(?<![a-z])(train|training|test|testing|val|valid|validation)(?![a-z])", re.IGNORECASE
)


def require_one_split(root: str, files: Sequence[str]) -> None:
    """Raises `ConfigError` where paths or URLs, at least one, belong to several splits.

    root: what names them. Splits between which its braces choose, as in `{train,val}-*.tar`, are
    wanted together.
    """
    paths, above = _parts(files)
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        for at in range(len(path) - 1, above - 1, -1):
            if split := _SPLIT.search(path[at]):
                one = path[at] if at < len(path) - 1 else f"{path[at][: split.end()]}*"
                suffix = os.path.splitext(path[-1])[1] * (one[-1] == "*")
                found.setdefault(_kind(split[1]), (split[1], "/".join([*path[:at], one]) + suffix))
                break
    if len(found) > 1 and not found.keys() <= _chosen(root):
        names = " and ".join(sorted(name for name, _ in found.values()))
        _, such = found.get("tr") or next(iter(found.values()))
        raise ConfigError(
            f"data.root {root} holds the splits {names}: name one of them, such as {such}."
        )


def _parts(paths: Sequence[str]) -> tuple[list[list[str]], int]:
    """The parts of each path, and how many folders all have in common: these tell nothing."""
    parts = [path.replace(os.sep, "/").split("/") for path in paths]
    folders = [path[:-1] for path in parts]
    first, last = min(folders), max(folders)  # in order, so that all others begin as both do
    other = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return parts, next(other, len(first))


def _kind(split: str) -> str:
    """Equal for the names of one split."""
    return split.lower()[:2]


def _chosen(root: str) -> set[str]:
    """The splits between which braces in the root choose."""
    paths, above = _parts(matching_words(root))
    words = [{_kind(name) for name in _SPLIT.findall("/".join(path[above:]))} for path in paths]
    return words[0].union(*words) - words[0].intersection(*words)
