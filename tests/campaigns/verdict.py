"""Is a run what an undisturbed one is? And the table at the end of a campaign."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from fastmoco.weights.checksums import OURS, leaves

TRACED = ("Traceback", "Error in sys.excepthook", "Exception ignored")
UNTRUE = "does not hold what it held"
"""A warning about metrics.jsonl, which nobody but the run has changed."""
# Speeds and memory differ between any two runs.
EXACT = ("loss", "pretext_top1", "pretext_top5", "knn_top1", "lr", "chance", "raw_pixel")


@dataclass(frozen=True)
class End:
    """What has to be the same, however often a run was disturbed."""

    tensors: dict[str, torch.Tensor]
    records: list[tuple[Any, ...]]
    board: dict[str, list[int]]
    bad: list[str]
    files: set[str]


def end_of(folder: Path) -> End:
    """Reads a run directory. Raises whatever its files raise where they are damaged."""
    content = torch.load(folder / "latest.pth.tar", weights_only=True)
    content[OURS] = {n: v for n, v in content[OURS].items() if n in ("step", "running_statistics")}
    tensors = {n: v for n, v in leaves(content) if isinstance(v, torch.Tensor)}
    tensors["step"] = torch.tensor(content[OURS]["step"])
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    board = {tag: [e.step for e in events.Scalars(tag)] for tag in ("loss", "knn_top1")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [(r["kind"], r["step"], *(r.get(name) for name in EXACT)) for r in lines]
    text = (folder / "bad_samples.jsonl").read_text(errors="replace")
    bad = [line for line in text.splitlines() if _whole(line)]
    names = {path.name for path in folder.iterdir()}
    varying = re.compile(r"checkpoint_\d+_step\d+\.pth\.tar|events\.out\.tfevents\..+")
    files = {name for name in names if not varying.fullmatch(name)}
    return End(tensors, records, board, bad, files)


def differences(folder: Path, whole: End) -> list[str]:
    """In which ways the run in a folder did not end as an undisturbed one."""
    try:
        end = end_of(folder)
    except Exception as error:
        return [f"its files cannot be read ({type(error).__name__}: {error})"]
    wrong = []
    names = end.tensors.keys() | whole.tensors.keys()
    unequal = [n for n in names if not _equal(end.tensors.get(n), whole.tensors.get(n))]
    if unequal:
        wrong.append(f"{len(unequal)} tensors differ, as {sorted(unequal)[0]}")
    if end.records != whole.records:
        more = Counter(r[:2] for r in end.records)
        more.subtract(Counter(r[:2] for r in whole.records))
        odd = {place: n for place, n in more.items() if n} or "values or order"
        wrong.append(f"metric records differ: {odd}")
    if end.board != whole.board:
        wrong.append(f"TensorBoard steps differ: {end.board['loss']}, {end.board['knn_top1']}")
    if sorted(end.bad) != sorted(whole.bad):
        wrong.append(f"bad_samples.jsonl has {len(end.bad)} lines instead of {len(whole.bad)}")
    if end.files != whole.files:
        wrong.append(f"files differ: {sorted(end.files ^ whole.files)}")
    return wrong


def _whole(line: str) -> bool:
    """Half a line is what a power loss may leave, and lines that are none are not believed."""
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def traced(text: str) -> list[str]:
    """The last line of a traceback in what a program printed, if there is one."""
    if not any(mark in text for mark in TRACED):
        return []
    last = [
        line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)", line)
    ]
    return [f"a traceback: {last[-1] if last else 'of an unknown kind'}"]


class Table:
    """Outcomes by kind of disturbance. Prints each failure at once, with how to repeat it."""

    def __init__(self, title: str, command: str) -> None:
        self._title, self._command, self._began = title, command, time.monotonic()
        self._rows: dict[str, Counter[str]] = {}
        self.failures = 0

    def add(self, kind: str, wrong: Sequence[str], *, again: str, outcome: str = "good") -> None:
        """Count one case; `again` are the options that repeat it alone."""
        row = self._rows.setdefault(kind, Counter())
        row["cases"] += 1
        row["FAILED" if wrong else outcome] += 1
        self.failures += bool(wrong)
        if wrong:
            print(f"FAILED {kind}: {'; '.join(wrong)}; again: {self._command} {again}", flush=True)

    def close(self) -> int:
        """Print the table and the line that sums it up; the exit code."""
        columns = sorted({name for row in self._rows.values() for name in row} - {"cases"})
        print(f"| {'disturbance':<42} | cases | {' | '.join(columns)} |")
        print(f"|{'-' * 44}|------:|{'|'.join('-' * (len(c) + 1) + ':' for c in columns)}|")
        for kind, row in sorted(self._rows.items()):
            cells = " | ".join(f"{row[name]:>{len(name)}}" for name in columns)
            print(f"| {kind:<42} | {row['cases']:>5} | {cells} |")
        cases = sum(row["cases"] for row in self._rows.values())
        seconds = time.monotonic() - self._began
        print(
            f"{self._title}: {cases - self.failures} of {cases} good, {self.failures} failed, "
            f"{seconds:.0f} s",
            flush=True,
        )
        return int(self.failures > 0)
