"""The record of replaced samples: `bad_samples.jsonl`, a count, and the share that stops a run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fastmoco.config import Config, ConfigError, OneRankError
from fastmoco.data.decode import BadImage
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import decode_sample
from fastmoco.data.sources.source import Source
from fastmoco.data.table import Int64
from fastmoco.machine import durable
from fastmoco.machine.collectives import gather_objects
from fastmoco.machine.ranks import World

BAD_SAMPLES = "bad_samples.jsonl"


class BadSamples:
    """The bad samples that this rank knows of, after `exchange` those of all ranks.

    Each rank lists what it finds; rank 0 also what indexing found. Unless `listed`, nobody does:
    for those who only look at the data of a run.
    """

    def __init__(
        self, config: Config, source: Source | None, rank: int, *, listed: bool = True
    ) -> None:
        self._source, self._rule = source, PixelRule.of(config.data)
        self._share = config.data.max_bad_share
        self.path = Path(config.run.dir) / BAD_SAMPLES
        self._listed = listed
        self.reasons: dict[int, str] = {}
        """Reason by sample number."""
        self._found: dict[int, str] = {}
        """Those that this rank has found since the last exchange."""
        self._unlisted: dict[int, str] = {}
        if source is None:
            return
        self.add(dict(source.bad), write=rank == 0)

    def record(self, replaced: Int64) -> None:
        """Lists the new ones among the replaced. replaced: (n, 2), asked for and delivered.

        Raises `OneRankError` above `data.max_bad_share`.
        """
        asked = replaced[replaced[:, 0] != replaced[:, 1], 0].tolist()
        new = {sample: self._reason(sample) for sample in asked if sample not in self.reasons}
        if new:
            self._found |= new
            try:
                self.add(new, write=True)
            except ConfigError as error:  # other ranks would have learned of them later
                raise OneRankError(str(error)) from error

    def exchange(self, world: World) -> str:
        """Learn what other ranks have found; all ranks call it after the same step.

        Returns a sentence about what any rank found since the last time, empty for nothing. Raises
        `ConfigError` above `data.max_bad_share`.
        """
        new: dict[int, str] = {}
        for found in gather_objects(self._found, world):
            new |= found
        self._found = {}
        self._list_if_possible()
        if not new:
            return ""
        self.add(new, write=False)
        names = self._named(new)
        return (
            f"{len(self.reasons)} bad samples so far, replaced by others: {names}"
            + f"; see {self.path}" * self._listed
        )

    def _reason(self, sample: int) -> str:
        """Reads the sample once more: reasons do not travel with the batches."""
        assert self._source is not None
        try:
            decode_sample(self._source, sample, self._rule)
        except BadImage as error:
            return str(error)
        return "could not be read once, but can be now"

    def add(self, reasons: dict[int, str], *, write: bool) -> None:
        """Takes note of bad samples. Raises `ConfigError` above `data.max_bad_share`."""
        assert self._source is not None
        self.reasons.update(reasons)
        if write and reasons and self._listed:
            self._unlisted.update(reasons)
            self._list_if_possible()
        total = len(self._source.sizes)
        if len(self.reasons) > self._share * total:
            raise ConfigError(
                f"{len(self.reasons)} of {total} samples are bad, more than data.max_bad_share "
                f"{self._share:g}; the latest is {self._source.name(max(reasons))}{self._all()}."
            )

    def _list_if_possible(self) -> None:
        """A disk that is full ends no run: its lines are written at the next exchange."""
        if self._unlisted:
            with contextlib.suppress(OSError):
                self._list()

    def _list(self) -> None:
        """Append a line for each that has none yet. Earlier starts and other ranks have theirs."""
        assert self._source is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = ""
        with contextlib.suppress(FileNotFoundError):
            there = durable.read_regular(self.path).decode(errors="replace")
        with open(self.path, "a", encoding="utf-8", errors="replace") as file:
            listed = {place for line in there.splitlines() if (place := _place(line))}
            lines = [
                self._line(sample, reason)
                for sample, reason in self._unlisted.items()
                if (sample, self._source.name(sample)) not in listed
            ]
            torn = "\n" if there and not there.endswith("\n") else ""
            file.write(torn * bool(lines) + "".join(lines))  # one write: ranks share the file
            file.flush()
            os.fsync(file.fileno())  # after a power loss they may not be found again
        self._unlisted.clear()

    def sentences(self) -> list[str]:
        """How many are known to be bad by now, with the first names; none where all are good."""
        if not self.reasons or self._source is None:
            return []
        return [
            f"{len(self.reasons):,} of {len(self._source.sizes):,} images cannot be used and are "
            f"replaced by others: {self._named(self.reasons)}{self._all()}."
        ]

    def _all(self) -> str:
        return f"; all are in {self.path}" if self._listed else ""

    def _named(self, reasons: dict[int, str]) -> str:
        """The first names of these, with their reasons."""
        assert self._source is not None
        first = (f"{self._source.name(n)} ({reasons[n]})" for n in sorted(reasons)[:3])
        more = f" and {len(reasons) - 3:,} more" if len(reasons) > 3 else ""
        return f"{', '.join(first)}{more}"

    def _line(self, sample: int, reason: str) -> str:
        assert self._source is not None
        row: dict[str, Any] = {"sample": sample, "name": self._source.name(sample)}
        return json.dumps({**row, "reason": reason}) + "\n"


def _place(line: str) -> tuple[int, str] | None:
    """Number and name of the sample that a line is about; None where it is cut short."""
    try:
        row = json.loads(line)
        return int(row["sample"]), str(row["name"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
