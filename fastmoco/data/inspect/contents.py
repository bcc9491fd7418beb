"""What is in a data set, as numbers: the whole set from its index, the rest from a sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmoco.data.inspect.duplicates import Copies, Pairs, find_across, find_copies
from fastmoco.data.inspect.look import Look
from fastmoco.data.sources.source import Source

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_QUOTED = re.compile(r"b?'[^']*'|b?\"[^\"]*\"")


@dataclass(frozen=True)
class Reason:
    """Why some pictures cannot be used."""

    text: str
    """Of several pictures without the numbers and bytes in which they differ."""
    pictures: int
    first: int
    """The number of the first of them in the set."""


@dataclass(frozen=True)
class Contents:
    """A data set, and how many of its pictures were looked at."""

    total: int
    sizes: NDArray[np.int32]
    """(N, 2): width and height of each; 0 of those whose header cannot be read."""
    looks: list[Look]
    """The sample, in the order of the set."""
    unreadable: int
    """Of all N: the header cannot be read."""
    reasons: list[Reason]
    """Of those, and of those of the sample that do not decode."""

    @property
    def good(self) -> list[Look]:
        """Those of the sample that can be used."""
        return [look for look in self.looks if not look.bad]

    @property
    def undecoded(self) -> int:
        """Of the sample: the header can be read, and the picture does not decode."""
        return sum(bool(look.bad) for look in self.looks) - self._known

    @property
    def _known(self) -> int:
        numbers = np.fromiter((look.sample for look in self.looks), np.int64, len(self.looks))
        return int((self.sizes[numbers].min(axis=1, initial=1 << 30) < 1).sum())

    @property
    def bad_share(self) -> float:
        """Of all pictures, the part that was not looked at estimated by the part that was."""
        readable = len(self.looks) - self._known
        late = self.undecoded / readable if readable else 0.0
        early = self.unreadable / self.total
        return early + (1 - early) * late

    def counts(self, name: str) -> Counter[str]:
        """How many good pictures of the sample have each value of a field of `Kind`."""
        return Counter(str(getattr(look.kind, name)) for look in self.good if look.kind)

    def shorter_sides(self) -> NDArray[np.int32]:
        """Of all pictures whose header can be read."""
        sides: NDArray[np.int32] = self.sizes.min(axis=1)
        return sides[sides > 0]


def contents_of(source: Source, looks: list[Look]) -> Contents:
    """The numbers of a set whose sample was looked at."""
    bad = source.bad
    named = bad | {look.sample: look.bad for look in looks if look.bad}
    return Contents(len(source.sizes), np.asarray(source.sizes), looks, len(bad), _reasons(named))


def _reasons(bad: dict[int, str]) -> list[Reason]:
    """The most frequent first."""
    kinds: dict[str, list[int]] = {}
    for sample in sorted(bad):
        kinds.setdefault(kind_of_reason(bad[sample]), []).append(sample)
    found = [
        Reason(kind if len(samples) > 1 else bad[samples[0]], len(samples), samples[0])
        for kind, samples in kinds.items()
    ]
    return sorted(found, key=lambda one: -one.pictures)


def kind_of_reason(reason: str) -> str:
    """A reason without the numbers and the bytes in which pictures differ."""
    return _NUMBER.sub("N", _QUOTED.sub("...", reason))


def quantiles(values: NDArray[np.int32]) -> list[int]:
    """Those of `QUANTILES`, each a value that occurs."""
    return [int(v) for v in np.quantile(values, QUANTILES, method="inverted_cdf")]


@dataclass(frozen=True)
class Duplicates:
    """Copies among the training pictures, and between these and the kNN test set."""

    looks: list[Look]
    """Training pictures, then those of the test set; places below count these."""
    training: int
    """How many of them are training pictures."""
    within: Copies
    """Among the training pictures."""
    exact: Pairs
    """A training picture and one of the test set with the same bytes."""
    near: Pairs
    """The same with nearly the same picture."""

    @property
    def tested(self) -> int:
        return len(self.looks) - self.training


def duplicates_of(training: Iterable[Look], test: Iterable[Look]) -> Duplicates:
    """Compares good pictures."""
    first = list(training)
    looks = [*first, *test]
    within = _copies(first)
    exact, near = find_across(_copies(looks), len(first)) if len(looks) > len(first) else ([], [])
    return Duplicates(looks, len(first), within, exact, near)


def _copies(looks: list[Look]) -> Copies:
    return find_copies([look.digest for look in looks], [look.hash for look in looks])
