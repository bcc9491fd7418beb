"""The record of a run: `metrics.jsonl`, one JSON object per line, and how to read it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.machine import durable

METRICS = "metrics.jsonl"
"""Its name in a run directory."""
# Steps before throughput counts: compilation, autotuning, allocator and prefetch warm up.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Record:
    """One line of `metrics.jsonl`. In the file the values stand beside the other fields."""

    kind: str
    """`train`: means since the record before; `knn`; `knn_baseline`: what training has to beat."""
    values: dict[str, float]
    """Metrics by name. A metric that was not computed is not in it."""
    step: int = 0
    """Steps done in all."""
    epoch: float = 0.0
    """Epochs done in all."""
    warmup: bool = False
    """Whether its steps compiled and filled caches, so that their speed says nothing."""

    def line(self) -> str:
        """The record as a JSON object on one line, without a line break."""
        place = {"kind": self.kind, "warmup": self.warmup, "step": self.step, "epoch": self.epoch}
        return json.dumps({**place, **self.values})


def parse_line(line: str) -> Record | None:
    """The record that a line holds; None for half a line, or one that is no record.

    Numbers are metrics. What is neither (null: not computed) is left out.
    """
    try:
        fields = json.loads(line)
        kind, step = fields["kind"], fields.get("step", 0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    epoch = fields.get("epoch", 0.0)
    if not isinstance(kind, str) or not isinstance(step, int) or not _is_number(epoch):
        return None
    place = ("kind", "step", "epoch", "warmup")
    values = {n: v for n, v in fields.items() if n not in place and _is_number(v)}
    return Record(kind, values, int(step), float(epoch), fields.get("warmup") is True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(metrics_jsonl: Path) -> list[Record]:
    """The records of a run in order.

    A line that does not parse is skipped: a killed run, or one that is still writing, leaves half
    a line at the end, and a resumed run continues after it.

    Raises `ConfigError` when the file cannot be read or holds no record.
    """
    records = read_records(metrics_jsonl)
    if not records:
        raise ConfigError(f"{metrics_jsonl} holds no metrics yet.")
    return records


def read_records(metrics_jsonl: Path) -> list[Record]:
    """The same of a file that may be empty. Raises `ConfigError` where it cannot be read."""
    try:
        text = durable.read_regular(metrics_jsonl).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"Cannot read the metrics {metrics_jsonl}: {error}.") from error
    return [record for line in text.splitlines() if (record := parse_line(line)) is not None]


# Of the steps that warm up, these say nothing about the run.
THROUGHPUT = ("images_per_second", "step_ms_p50", "data_wait_percent")


def series(records: list[Record], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric, from the records of this kind that have it.

    A record whose step is not past the one before replaces what lies at or after its step: so
    reads a run that was resumed from a checkpoint older than its last line.
    """
    points: list[tuple[int, float, float]] = []
    for record in records:
        slow_start = record.warmup and name in THROUGHPUT
        if record.kind == kind and name in record.values and not slow_start:
            while points and points[-1][0] >= record.step:
                points.pop()
            points.append((record.step, record.epoch, record.values[name]))
    return [epoch for _, epoch, _ in points], [value for _, _, value in points]


def digest(metrics_jsonl: Path, size: int = -1) -> str:
    """Number of bytes and a hash of the first `size` bytes, of all by default; `0` for no file.

    A checkpoint has it, because a line with another digit looks as good as the one that was
    written. Raises `OSError`.
    """
    if not metrics_jsonl.exists():
        return "0"
    content = durable.read_regular(metrics_jsonl)
    content = content if size < 0 else content[:size]
    return f"{len(content)} {hashlib.sha256(content).hexdigest()[:16]}" if content else "0"


def knn_summary(metrics_jsonl: Path) -> str:
    """The last kNN accuracy beside the marks it had to beat, in one line.

    Raises `ConfigError` for a file that is missing or holds no metrics.
    """
    records = read_metrics(metrics_jsonl)
    trained = series(records, "knn", "knn_top1")[1]
    marks = [record.values for record in records if record.kind == "knn_baseline"][-1:]
    if not trained and not marks:
        return "kNN was not evaluated"
    labels = {"chance": "chance", "raw_pixel": "raw pixels", "untrained": "untrained encoder"}
    parts = [
        f"{label} {100 * mark[name]:.1f} %"
        for mark in marks
        for name, label in labels.items()
        if name in mark
    ]
    last = f"{100 * trained[-1]:.1f} %" if trained else "not evaluated yet"
    return "kNN top-1: " + ", ".join([*parts, f"trained encoder {last}"])


def train_summary(metrics_jsonl: Path) -> str:
    """Where training stands, in one line. Raises `ConfigError` as `knn_summary` does."""
    records = read_metrics(metrics_jsonl)
    last = next((r for r in reversed(records) if r.kind == "train"), None)
    if last is None:
        return "no step was logged yet"
    numbers = {name: last.values.get(name, math.nan) for name in ("loss", "loss_random")}
    return (
        f"step {last.step}, epoch {last.epoch:.2f}: "
        f"loss {numbers['loss']:.3f} (random {numbers['loss_random']:.2f}), "
        f"pretext {100 * last.values.get('pretext_top1', math.nan):.1f} %"
    )
