"""The record of a run: `metrics.jsonl`, one JSON object per line, and how to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmoco.config import ConfigError

Record = dict[str, Any]


def read_metrics(metrics_jsonl: Path) -> list[Record]:
    """The records of a run in order, each a JSON object with a `kind`.

    A line that does not parse is skipped: a killed run, or one that is still writing, leaves half
    a line at the end, and a resumed run continues after it.

    Raises `ConfigError` when the file cannot be read or holds no record.
    """
    try:
        lines = metrics_jsonl.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read the metrics {metrics_jsonl}: {error}.") from error
    records: list[Record] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise ConfigError(f"{metrics_jsonl} holds no metrics yet.")
    return records


# Of the steps that warm up, these say nothing about the run.
THROUGHPUT = ("images_per_second", "step_ms_p50", "data_wait_percent")


def series(records: list[Record], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric, from the records of this kind that have it.

    A record whose step is not past the one before replaces what lies at or after its step: so
    reads a run that was resumed from a checkpoint older than its last line.
    """
    points: list[tuple[int, float, float]] = []
    for record in records:
        slow_start = record.get("warmup") and name in THROUGHPUT
        if record.get("kind") == kind and record.get(name) is not None and not slow_start:
            step = int(record["step"])
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, float(record["epoch"]), float(record[name])))
    return [epoch for _, epoch, _ in points], [value for _, _, value in points]


def knn_summary(metrics_jsonl: Path) -> str:
    """The last kNN accuracy beside the marks it had to beat, in one line.

    Raises `ConfigError` for a file that is missing or holds no metrics.
    """
    records = read_metrics(metrics_jsonl)
    trained = series(records, "knn", "knn_top1")[1]
    if not trained:
        return "kNN was not evaluated (knn.every is 0)"
    marks = [record for record in records if record.get("kind") == "knn_baseline"][-1:]
    parts = [
        f"{label} {100 * float(mark[name]):.1f} %"
        for mark in marks
        for name, label in (
            ("chance", "chance"),
            ("raw_pixel", "raw pixels"),
            ("untrained", "untrained encoder"),
        )
        if mark.get(name) is not None
    ]
    return "kNN top-1: " + ", ".join([*parts, f"trained encoder {100 * trained[-1]:.1f} %"])


def train_summary(metrics_jsonl: Path) -> str:
    """Where training stands, in one line. Raises `ConfigError` as `knn_summary` does."""
    records = read_metrics(metrics_jsonl)
    last = next((r for r in reversed(records) if r.get("kind") == "train"), None)
    if last is None:
        return "no step was logged yet"
    return (
        f"step {last['step']}, epoch {float(last['epoch']):.2f}: "
        f"loss {float(last['loss']):.3f} (random {float(last['loss_random']):.2f}), "
        f"pretext {100 * float(last['pretext_top1']):.1f} %"
    )
