"""The report page: one file that opens anywhere and shows what the records hold."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastmoco.config import ConfigError
from fastmoco.report import main
from fastmoco.run.page.html_report import name_apart, write_report
from fastmoco.run.page.svg_plot import Line, number, plot, thinned, ticks

CONFIG = "optim: {global_batch_size: 64}\nmoco: {symmetric: false, queue_size: 128}\n"


def train(step: int, **change: Any) -> dict[str, Any]:
    values = {"loss": 3.0, "loss_random": math.log(129), "pretext_top1": 0.3, "pretext_top5": 0.6}
    speed = {"lr": 0.03, "images_per_second": 99.0, "data_wait_percent": 4.0}
    return {"kind": "train", "step": step, "epoch": step / 10, **values, **speed} | change


def run(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


class Links(HTMLParser):
    """Everything a page would fetch, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for n, v in attributes if n in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(*folders: Path) -> str:
    out = folders[0] / "report.html"
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


def test_page_fetches_nothing_and_closes_its_tags(tmp_path: Path) -> None:
    text = report(run(tmp_path / "<a & b>", [train(10), train(20)]))
    links = Links(text)
    assert links.fetched == ["data:,"]
    assert not links.open
    assert "<script" not in text
    assert "url(" not in text
    assert "&lt;a &amp; b&gt;" in text
    assert "<a & b>" not in text


def test_a_running_run_with_half_a_line_is_shown_to_its_last_record(tmp_path: Path) -> None:
    text = report(run(tmp_path / "a", [train(10), train(20, loss=2.5)], '{"kind": "tra'))
    assert "step 20" in text
    assert "training loss <b>2.5</b>" in text


def test_panels_are_those_with_records(tmp_path: Path) -> None:
    plain = report(run(tmp_path / "plain", [train(10)]))
    knn = {"kind": "knn", "step": 10, "epoch": 1.0, "knn_top1": 0.5}
    marks = {"kind": "knn_baseline", "raw_pixel": None, "untrained": 0.25, "chance": 0.1}
    monitored = report(run(tmp_path / "knn", [marks, train(10), knn]))
    assert "kNN accuracy" not in plain
    assert "trained encoder <b>50</b>" in monitored
    assert "untrained encoder <b>25</b>" in monitored
    assert "raw pixels <b>" not in monitored
    assert monitored.count('class="plot"') == plain.count('class="plot"') + 1


def test_quality_and_gpu_are_drawn_where_they_were_recorded(tmp_path: Path) -> None:
    quality = {"std_q": 0.08, "std_k": 0.09, "std_even": 0.125, "alignment": 0.4}
    quality |= {"uniformity_q": -2.0, "uniformity_k": -2.5, "features": 640.0}
    ranks = [{"effective_rank_q": r, "effective_rank_k": r + 1} for r in (31.0, 20.0, 42.0)]
    gpu = {"gpu_utilization_percent": 93.0, "power_w": 512.0, "sm_clock_mhz": 1700.0}
    steps = [train(step, **quality, **gpu, **r) for step, r in zip((3, 10, 20), ranks, strict=True)]
    plain = report(run(tmp_path / "plain", [train(10)]))
    text = report(run(tmp_path / "gpu", steps))
    assert text.count('class="plot"') == plain.count('class="plot"') + 6
    for label in ("queries <b>42", "keys <b>43", "untrained encoder <b>31", "GPU of rank 0 <b>512"):
        assert label in text
    assert "spread evenly, 1/√C <b>0.125" in text
    assert 'aria-label="GPU utilization (%)"' in text


def test_a_percent_sign_stays_with_its_number(tmp_path: Path) -> None:
    knn = {"kind": "knn", "step": 10, "epoch": 1.0, "knn_top1": 0.5}
    marks = {"kind": "knn_baseline", "untrained": 0.6, "chance": 0.1}
    text = report(run(tmp_path / "knn", [marks, train(10), knn]))
    assert "below the untrained encoder" in text
    assert text.count("\u00a0%") > 4
    assert not re.findall(r"[0-9] %", text)


def test_an_alarm_is_told_once_with_its_first_and_last_epoch(tmp_path: Path) -> None:
    leak = [train(step, pretext_top1=1.0) for step in (2, 60, 120, 180)]
    text = report(run(tmp_path / "leak", leak))
    (alarm,) = re.findall("<li><b>epoch ([^<]*)</b>: pretext accuracy is 100.0\u00a0%", text)
    assert alarm == "6.00 to 18.00"  # at step 2 it is too early to tell
    assert "No alarm" in report(run(tmp_path / "healthy", [train(10), train(30)]))


def test_two_runs_are_told_apart_without_colour(tmp_path: Path) -> None:
    first = run(tmp_path / "a" / "moco", [train(10)])
    second = run(tmp_path / "b" / "moco", [train(10), train(40, loss=1.5)])
    text = report(first, second)
    assert "a/moco <b>3</b>" in text
    assert "b/moco <b>1.5</b>" in text
    assert "<circle" in text
    assert "<polygon" in text
    assert 'stroke-dasharray="7 3"' in text
    assert "<h1>a/moco and b/moco</h1>" in text
    third = run(tmp_path / "c" / "moco", [train(10)])
    assert "<h1>a/moco, b/moco and c/moco</h1>" in report(first, second, third)


def test_names_are_the_shortest_that_differ() -> None:
    assert name_apart([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert name_apart([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert name_apart([Path("/x/a"), Path("/x/a")]) == ["1: a", "2: a"]


def test_a_folder_without_a_run_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = run(tmp_path / "good", [train(10)])
    with pytest.raises(ConfigError, match="Cannot write the page"):
        write_report([good], tmp_path / "nowhere" / "report.html")
    assert main([str(good), str(tmp_path / "missing")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastmoco: Cannot read the metrics")
    assert told.count("\n") == 1


def test_curves_lie_where_their_values_are() -> None:
    drawn = plot("t", [Line("l", [0.0, 5.0, 10.0], [0.0, 50.0, 100.0])], low=0, high=100)
    (path,) = re.findall('class="curve" d="([^"]*)"', drawn)
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]
    assert points == [(48.0, 176.0), (198.0, 93.0), (348.0, 10.0)]


def test_a_value_that_is_no_number_interrupts_the_curve() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0]
    drawn = plot("t", [Line("l", [0.0, 1.0, 2.0, 3.0, 4.0], values)])
    (path,) = re.findall('class="curve" d="([^"]*)"', drawn)
    assert re.sub("[^ML]", "", path) == "MLML"
    assert "nan" not in drawn


def test_a_long_curve_keeps_its_peaks_and_its_end() -> None:
    x = [float(i) for i in range(10_000)]
    y = [math.sin(i) for i in range(10_000)]
    y[4321], y[-1] = 50.0, -7.0
    points = thinned(x, y)
    assert len(points) < 700
    assert (4321.0, 50.0) in points
    assert points[-1] == (9999.0, -7.0)
    assert points == sorted(points)
    assert thinned(x[:500], y[:500]) == list(zip(x[:500], y[:500], strict=True))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 25, 50, 75, 100]
    assert ticks(-0.3, 7.1) == [0, 2, 4, 6]
    assert ticks(2, 2) == [2]
    assert [number(v) for v in (0.03, 3e-5, 950, 12_345, 2e6)] == [
        *("0.03", "3e-05", "950", "12.3k", "2M")
    ]
