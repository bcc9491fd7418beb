"""Lines of metrics.jsonl: written, read back, read from older versions, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmoco.config import ConfigError
from fastmoco.run.record import Record, parse_line, read_metrics, train_summary

TRAIN = Record("train", {"loss": 6.25, "lr": 0.03, "bad_samples": 2}, 40, 0.5, True)


def test_a_record_comes_back_as_it_was_written() -> None:
    assert parse_line(TRAIN.line()) == TRAIN
    assert "\n" not in TRAIN.line()
    assert json.loads(TRAIN.line()) == {
        **{"kind": "train", "warmup": True, "step": 40, "epoch": 0.5},
        **{"loss": 6.25, "lr": 0.03, "bad_samples": 2},
    }


def test_lines_of_older_versions_still_load() -> None:
    """As version 0.1 wrote them: no place in a baseline, null for what was not computed."""
    baseline = '{"kind": "knn_baseline", "raw_pixel": null, "untrained": 0.25, "chance": 0.1}'
    assert parse_line(baseline) == Record("knn_baseline", {"untrained": 0.25, "chance": 0.1})
    knn = '{"kind": "knn", "step": 8, "epoch": 2.0, "knn_top1": 0.5}'
    assert parse_line(knn) == Record("knn", {"knn_top1": 0.5}, 8, 2.0)
    train = '{"kind": "train", "step": 3, "epoch": 0.3, "loss": NaN, "peak_memory_gib": null}'
    record = parse_line(train)
    assert record is not None
    assert list(record.values) == ["loss"]
    assert record.values["loss"] != record.values["loss"]


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "[1]", "3", "null", '"kind"', "{}", "\x00\x00"),
        *('{"step": 3}', '{"kind": 3, "step": 3}', '{"kind": "train", "step": "three"}'),
        *('{"kind": "train", "step": null}', '{"kind": "train", "step": Infinity}'),
        '{"kind": "train", "step": 3, "epoch": "half"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_no_record(line: str, tmp_path: Path) -> None:
    assert parse_line(line) is None
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{line}\n{TRAIN.line()}\n")
    assert read_metrics(file) == [TRAIN]
    file.write_text(line + "\n")
    with pytest.raises(ConfigError, match="no metrics yet"):
        read_metrics(file)


def test_a_summary_needs_no_metric(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train", "step": 3, "epoch": 0.5}\n')
    assert train_summary(file).startswith("step 3, epoch 0.50: loss nan")
