"""What is read from a run's metrics, and that a picture shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.report import main
from fastmoco.run.curves import draw_curves
from fastmoco.run.record import Record, knn_summary, parse_line, read_metrics, series


def train_line(step: int, **change: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 10,
        "loss": 7 - step / 50,
        "loss_random": math.log(2049),
        "pretext_top1": 0.3,
        "pretext_top5": 0.6,
        "lr": 0.06,
        "images_per_second": 200.0,
        "step_ms_p50": 300.0,
        "data_wait_percent": 4.0,
        "peak_memory_gib": None,
    } | change


def knn_line(step: int, top1: float) -> dict[str, Any]:
    return {"kind": "knn", "step": step, "epoch": step / 10, "knn_top1": top1}


# The untrained encoder above the curve: its line must not fall off the panel.
BASELINE = {"kind": "knn_baseline", "raw_pixel": 0.1, "untrained": 0.8, "chance": 1 / 12}


def write(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colour_count(path: Path, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels(path).astype(int) - wanted).max(axis=2) < 8).sum())


def parsed(lines: list[dict[str, Any]]) -> list[Record]:
    records = [parse_line(json.dumps(line)) for line in lines]
    assert None not in records
    return [record for record in records if record]


GREEN = "#2c9a6b"  # the kNN curve


def test_half_a_line_is_skipped_at_the_end_and_after_a_resume(tmp_path: Path) -> None:
    path = write(tmp_path, [train_line(10)], '{"kind": "train", "st')
    assert [r.step for r in read_metrics(path)] == [10]
    path.write_text(path.read_text() + "\n" + json.dumps(train_line(20)) + "\n")
    assert [r.step for r in read_metrics(path)] == [10, 20]


def test_a_resumed_run_replaces_what_it_repeats() -> None:
    records = [train_line(s, loss=1.0) for s in (10, 20, 30, 40)]
    records += [train_line(s, loss=2.0) for s in (25, 30)]
    assert series(parsed(records), "train", "loss") == ([1.0, 2.0, 2.5, 3.0], [1.0, 1.0, 2.0, 2.0])


def test_series_takes_its_own_kind_and_skips_missing_values() -> None:
    records = [BASELINE, train_line(10), knn_line(10, 0.5), train_line(20, loss=None)]
    assert series(parsed(records), "train", "loss") == ([1.0], [6.8])
    assert series(parsed(records), "knn", "knn_top1") == ([1.0], [0.5])
    assert series(parsed(records), "train", "knn_top1") == ([], [])
    assert series(parsed(records), "train", "peak_memory_gib") == ([], [])


def test_every_recorded_metric_gets_its_panel(tmp_path: Path) -> None:
    steps = range(10, 400, 10)
    training = [train_line(s) for s in steps]
    draw_curves(write(tmp_path, training), tmp_path / "without.png")
    knn = [knn_line(s, 0.2 + s / 1000) for s in steps]
    draw_curves(write(tmp_path, [*training, *knn]), tmp_path / "with.png")
    draw_curves(write(tmp_path, [BASELINE, *training, *knn]), tmp_path / "baselines.png")
    assert colour_count(tmp_path / "without.png", GREEN) == 0
    assert colour_count(tmp_path / "with.png", GREEN) > 300
    grey = "#8a919c"
    added = colour_count(tmp_path / "baselines.png", grey) - colour_count(
        tmp_path / "with.png", grey
    )
    assert added > 1200, "three lines across a panel"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "baselines.png",
        "metrics.jsonl",
        "with.png",
        "without.png",
    ]


def test_a_single_point_is_visible(tmp_path: Path) -> None:
    draw_curves(write(tmp_path, [knn_line(10, 0.4)], '{"ki'), tmp_path / "one.png")
    assert colour_count(tmp_path / "one.png", GREEN) > 20


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_diverged_run_can_be_drawn(loss: float, tmp_path: Path) -> None:
    path = write(tmp_path, [train_line(10), train_line(20, loss=loss)])
    draw_curves(path, tmp_path / "nan.png")
    assert pixels(tmp_path / "nan.png").shape[0] > 300


def test_nothing_to_draw_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the metrics"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "out.png")
    with pytest.raises(ConfigError, match="holds no metrics yet"):
        draw_curves(write(tmp_path, [], '{"kind"'), tmp_path / "out.png")
    with pytest.raises(ConfigError, match="holds no metrics to draw yet"):
        draw_curves(write(tmp_path, [{"kind": "note"}]), tmp_path / "out.png")
    with pytest.raises(ConfigError, match="Cannot write the curves"):
        draw_curves(write(tmp_path, [train_line(1)]), tmp_path / "missing" / "out.png")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [train_line(1), train_line(2)])
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    main()
    assert pixels(tmp_path / "curves.png").std() > 1


def test_summary_sets_the_last_accuracy_beside_its_marks(tmp_path: Path) -> None:
    lines = [BASELINE, train_line(10), knn_line(10, 0.25), train_line(20), knn_line(20, 0.5)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert knn_summary(file) == (
        "kNN top-1: chance 8.3 %, raw pixels 10.0 %, untrained encoder 80.0 %, "
        "trained encoder 50.0 %"
    )
    file.write_text(json.dumps(train_line(10)) + "\n")
    assert knn_summary(file) == "kNN was not evaluated"


def test_a_run_stopped_before_its_first_monitor_is_not_told_that_it_has_none(
    tmp_path: Path,
) -> None:
    assert knn_summary(write(tmp_path, [BASELINE, train_line(10)])) == (
        "kNN top-1: chance 8.3 %, raw pixels 10.0 %, untrained encoder 80.0 %, "
        "trained encoder not evaluated yet"
    )
