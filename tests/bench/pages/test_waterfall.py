"""The waterfall adds up, and a picture of old rows is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bench.ablation import EVERYTHING, PLAIN, PUBLISHED
from bench.pages import waterfall as waterfalls
from bench.pages.waterfall import BLUE, GRAY, GREEN, RED


def waterfall() -> list[dict[str, object]]:
    """Published 100 ms, rewritten 90, bf16 makes it 120, channels-last 40."""
    times = {PUBLISHED: 100.0, PLAIN: 90.0, "bf16": 120.0, EVERYTHING: 40.0}
    case = {"arch": "resnet18", "image_size": 32, "batch": 8, "queue_size": 64, "precision": "bf16"}
    where = {
        "device": "cpu",
        "cpu": "a processor",
        "extension": "avx2",
        "threads": 2,
        "commit": "0" * 40,
    }
    return [
        {
            "contestant": name,
            "step_ms": [ms - 1, ms, ms + 1],
            "order": ["bf16", "channels-last"],
            "case": case | {"part": "waterfall"},
            "environment": where | {"load_average": 0.1, "date": "2026-01-01", "dirty": False},
            "n": 20,
        }
        for name, ms in times.items()
    ]


def test_bars_lead_from_the_published_step_to_ours() -> None:
    assert waterfalls.bars(waterfall()) == [
        ("published step", 0, 100, GRAY),
        ("rewritten, all of the below off", 90, 100, GREEN),
        ("+ bf16", 90, 120, RED),
        ("+ channels-last", 40, 120, GREEN),
        ("our step", 0, 40, BLUE),
    ]


def test_picture_of_other_rows_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ablation.png"
    monkeypatch.setattr(waterfalls, "published", lambda: ([waterfall()], "digest"))
    assert waterfalls.is_stale(path)
    waterfalls.draw([waterfall()], path, "digest")
    assert not waterfalls.is_stale(path)
    with Image.open(path) as image:
        assert min(image.size) > 200
    monkeypatch.setattr(waterfalls, "published", lambda: ([waterfall()], "another"))
    assert waterfalls.is_stale(path)


def test_committed_picture_is_not_stale() -> None:
    assert not waterfalls.is_stale(), "run make bench-report"
