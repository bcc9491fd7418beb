"""Everything that `fastmoco inspect` finds, in the order in which a page shows it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastmoco.config import Config
from fastmoco.data.inspect.advice import Advice
from fastmoco.data.inspect.contents import QUANTILES, Contents, Duplicates, quantiles
from fastmoco.data.inspect.duplicates import spare
from fastmoco.data.sources.source import Source

_GROUPS_SHOWN = 3
_MOST_VALUES = 8
_KINDS = {
    "format": "format",
    "mode": "mode",
    "bits": "bits of a value",
    "channels": "channels",
    "orientation": "EXIF orientation",
}


@dataclass(frozen=True)
class Findings:
    """A data set, its kNN test set if it has one, and what to do."""

    config: Config
    """The advice is in it where there is any."""
    source: Source
    contents: Contents
    test: Source | None
    duplicates: Duplicates
    advice: Advice
    rate: float
    """Images per second of the loader; 0 where it could not be measured."""
    loader: str
    """What the loader consists of, or why it could not be measured."""
    notes: list[str]

    @property
    def root(self) -> str:
        return self.config.data.root

    def name(self, sample: int) -> str:
        """Of a training picture, below the folder that it and the test set have in common."""
        return self._below(self.source.name(sample))

    def name_at(self, place: int) -> str:
        """Of a picture that was compared, see `Duplicates`."""
        sample = self.duplicates.looks[place].sample
        if place < self.duplicates.training or self.test is None:
            return self.name(sample)
        return self._below(self.test.name(sample))

    def _below(self, name: str) -> str:
        roots = [self.root, *([self.config.knn.test_root] if self.test else [])]
        folders = [root if os.path.isdir(root) else os.path.dirname(root) for root in roots]
        above = os.path.commonpath([os.path.abspath(folder) for folder in folders])
        return os.path.relpath(name, above) if name.startswith(f"{above}/") else name


@dataclass(frozen=True)
class Section:
    """A heading, a table if there are rows, and sentences."""

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    sentences: list[str] = field(default_factory=list)


def sections(found: Findings) -> list[Section]:
    """All of the page but the advice and the pictures."""
    return [
        _overview(found),
        _sizes(found.contents),
        _kinds(found.contents),
        _reasons(found),
        _within(found),
        *([_across(found)] if found.test else []),
        _loader(found),
    ]


def _overview(found: Findings) -> Section:
    contents = found.contents
    looked, total = len(contents.looks), contents.total
    # Files with an unreadable header are not read, so that nobody knows how large they are.
    read = [look.size for look in contents.looks if look.size]
    size = sum(read) / max(1, len(read)) * (total - contents.unreadable)
    told = [f"{total:,} pictures, about {_bytes(size)} in all."]
    if looked < total:
        told.append(
            f"Sizes and unreadable headers are those of all; all else is of {looked:,} pictures, "
            "evenly spaced (--samples 0 looks at all)."
        )
    return Section("Pictures", sentences=told + found.notes)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _sizes(contents: Contents) -> Section:
    known = contents.sizes[contents.sizes.min(axis=1) > 0]
    columns = {
        "width": known[:, 0],
        "height": known[:, 1],
        "shorter side": known.min(axis=1),
    }
    header = ["pixels", *("median" if q == 0.5 else f"{100 * q:.0f} %" for q in QUANTILES)]
    header[1], header[-1] = "least", "most"
    rows = [[name, *(f"{v:,}" for v in quantiles(values))] for name, values in columns.items()]
    return Section("Size", header, rows)


def _kinds(contents: Contents) -> Section:
    rows = []
    for name, told in _KINDS.items():
        counted = contents.counts(name).most_common()
        words = [f"{_value(name, value)} ({number:,})" for value, number in counted]
        rest = [f"{len(words) - _MOST_VALUES:,} others"] if len(words) > _MOST_VALUES else []
        rows.append([told, ", ".join(words[:_MOST_VALUES] + rest)])
    return Section("Kind", ("", "value (pictures)"), [row for row in rows if row[1]])


def _value(name: str, value: str) -> str:
    return "upright" if name == "orientation" and value == "1" else value


def _reasons(found: Findings) -> Section:
    contents = found.contents
    if not contents.reasons:
        return Section("Cannot be used", sentences=["None."])
    told = [
        f"{contents.unreadable:,} of {contents.total:,} headers cannot be read; of "
        f"{len(contents.looks):,} pictures {contents.undecoded:,} more do not decode."
    ]
    rows = [[f"{one.pictures:,}", one.text, found.name(one.first)] for one in contents.reasons]
    return Section("Cannot be used", ("pictures", "reason", "first"), rows, told)


def _within(found: Findings) -> Section:
    duplicates, total = found.duplicates, found.contents.total
    groups = duplicates.within
    told = []
    for what, some in (("have the same bytes as", groups.exact), ("look nearly like", groups.near)):
        examples = [f"{found.name_at(g[0])} = {found.name_at(g[1])}" for g in some[:_GROUPS_SHOWN]]
        named = f", in {len(some):,} groups: {'; '.join(examples)}" if some else ""
        told.append(f"{spare(some):,} of {duplicates.training:,} {what} another{named}.")
    told += _rarely(len(found.contents.looks), total)
    return Section("There more than once", sentences=told)


def _rarely(looked: int, total: int) -> list[str]:
    if looked >= total:
        return []
    return [f"Of copies, about one pair in {(total / max(1, looked)) ** 2:,.0f} was seen whole."]


def _across(found: Findings) -> Section:
    duplicates = found.duplicates
    assert found.test is not None
    told = []
    for what, pairs in (
        ("the same bytes as", duplicates.exact),
        ("nearly the look of", duplicates.near),
    ):
        examples = [f"{found.name_at(b)} = {found.name_at(a)}" for a, b in pairs[:_GROUPS_SHOWN]]
        named = f": {'; '.join(examples)}" if pairs else ""
        told.append(
            f"{len(pairs):,} of {duplicates.tested:,} test pictures have {what} a training "
            f"picture{named}."
        )
    looked = len(found.contents.looks), len(found.test.sizes)
    seen = duplicates.tested / max(1, looked[1]) * looked[0] / found.contents.total
    if looked[0] < found.contents.total or duplicates.tested < looked[1]:
        told.append(f"About one such pair in {1 / max(seen, 1e-12):,.0f} was seen.")
    return Section("In training and in the kNN test set", sentences=told)


def _loader(found: Findings) -> Section:
    if not found.rate:
        return Section("Loader on this machine", sentences=[found.loader])
    minutes = found.contents.total / found.rate / 60
    epoch = f"{60 * minutes:.3g} seconds"
    if minutes >= 2:
        epoch = f"{minutes / 60:,.1f} hours" if minutes >= 120 else f"{minutes:.0f} minutes"
    told = f"{found.rate:,.0f} images/s, two views of each: {epoch} an epoch; {found.loader}."
    return Section("Loader on this machine", sentences=[told])


def examples(found: Findings, of_each: int) -> list[tuple[str, int, int]]:
    """Pairs of copies to show: what they are, and their places."""
    duplicates = found.duplicates
    kinds = {
        "nearly alike, training and test": duplicates.near,
        "same bytes, training and test": duplicates.exact,
        "nearly alike": [(group[0], group[1]) for group in duplicates.within.near],
        "same bytes": [(group[0], group[1]) for group in duplicates.within.exact],
    }
    return [(kind, a, b) for kind, pairs in kinds.items() for a, b in pairs[:of_each]]
