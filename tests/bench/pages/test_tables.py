"""The tables of the documents come from rows, and a stale one is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import races
from bench.measure.contest import Result, Window
from bench.measure.rows import RESULTS, case_of
from bench.pages import tables
from bench.pages.tables import cell, figure
from bench.throughput import ratios_of
from fastmoco.config import Config

WHERE = {
    "device": "cpu",
    "cpu": "a processor",
    "extension": "avx2",
    "threads": 2,
    "commit": "0123456789",
    "load_average": 0.5,
    "dirty": False,
}
FACTS = {"peak_memory_gib": 1.5, "host_syncs": 0, "threads": 2}
Rows = list[dict[str, Any]]


def rows(date: str, factor: float, dirty: bool = False) -> Rows:
    """A contest in which our step takes 1 s and the published one `factor` s."""
    results = {
        "step": Result([Window(1, 1.0, 2.0, 0.1)] * 3, FACTS),
        "official": Result([Window(1, factor, 2 * factor, 0.0)] * 3, FACTS),
    }
    shared = {
        "case": case_of(Config()),
        "ratios": ratios_of(results),
        "environment": {**WHERE, "date": date, "dirty": dirty},
    }
    return [{**shared, "contestant": name, **result.row(256)} for name, result in results.items()]


def row_of(case: dict[str, Any], contestant: str, **more: Any) -> dict[str, Any]:
    """A row of the kinds that stand beside the contest's."""
    whole = {"arch": "resnet18", "image_size": 32, "batch": 8, "queue_size": 64} | case
    where = {**WHERE, "date": "2026-01-01"} | more.pop("environment", {})
    return {
        "case": whole | {"precision": "bf16"},
        "contestant": contestant,
        "environment": where,
        **more,
    }


def table(folder: Path, name: str, made: Sequence[dict[str, Any]]) -> str:
    file = folder / f"{tables.TABLES[name][0]}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return tables.table(name, folder)


def test_table_shows_the_latest_clean_run(tmp_path: Path) -> None:
    made = [
        *rows("2026-01-01", 2.0),
        *rows("2026-01-02", 3.0),
        *rows("2026-01-03", 9.0, dirty=True),
    ]
    shown = table(tmp_path, "throughput", made)
    assert "| 256.0 | - | - | 85.33 | - | 3.00 (3.00-3.00) | - | - | 1.50, 1.50 |" in shown
    assert len(shown.splitlines()) == 3
    speed = table(tmp_path, "speed", made)
    assert "| 85.33 | 256.0 | **3.00** |" in speed


def test_our_step_as_a_cuda_graph_is_our_step_where_only_that_was_raced(tmp_path: Path) -> None:
    made = [row | {"ratios": {}} for row in rows("2026-01-01", 4.0)]
    made[0]["contestant"] = "captured"
    shown = table(tmp_path, "throughput", made)
    assert "| 256.0 | - | - | 64.00 | - | 4.00 | - | - | 1.50, 1.50 |" in shown
    assert "| 64.00 | 256.0 | **4.00** |" in table(tmp_path, "speed", made)
    launched = made[0] | {"contestant": "step", "p50_images_per_second": 32.0}
    assert "| 64.00 | 32.00 | **0.50** |" in table(tmp_path, "speed", [*made, launched])


def test_pairs_that_ran_apart_stand_in_one_line_and_the_fed_in_one_of_their_own(
    tmp_path: Path,
) -> None:
    published, bare = rows("2026-01-01", 2.0), rows("2026-01-02", 4.0)
    for row in bare:  # the same case in another contest: our step beside the bare encoder
        row["contestant"] = row["contestant"].replace("official", "encoder")
        row["ratios"] = {"our step / bare encoder": row["ratios"]["our step / published step"]}
    fed = [row | {"contestant": "end_to_end", "ratios": {}} for row in rows("2026-01-03", 1.0)[:1]]
    fed[0]["case"] = {**fed[0]["case"], "data": "shards"}
    shown = table(tmp_path, "throughput", [*published, *bare, *fed]).splitlines()
    line = (
        "| 256.0 | - | 64.00 | 128.0 | - | 2.00 (2.00-2.00) | 4.00 (4.00-4.00) | - | 1.50, 1.50 |"
    )
    assert shown[2].endswith(line)
    assert shown[3].endswith("| - | 256.0 | - | - | - | - | - | - | - |")
    assert "| 128.0 | 256.0 | **2.00** |" in table(tmp_path, "speed", [*published, *bare, *fed])
    assert "64.00" not in table(tmp_path, "throughput", [*bare, *published_elsewhere(published)])


def published_elsewhere(made: Rows) -> Rows:
    """The same rows, later and of another commit."""
    where = {**WHERE, "date": "2026-02-01", "commit": "after"}
    return [row | {"environment": where} for row in made]


def test_no_quantile_of_fewer_than_three_measurements() -> None:
    assert cell([1.0, 2.0, 3.0], 3) == "2.00 (1.00-3.00)"
    assert cell([2.0, 2.0, 2.0], 1) == "2.00 (n=1)"


def test_the_loaders_table_holds_pipelines_only(tmp_path: Path) -> None:
    spread = {"p20": 900.0, "p50": 1234.5, "p80": 2000.0, "n": 21}
    contest = [
        row_of({"part": "pipeline"}, name, **spread, ratios=[1, ratio, 9])
        for name, ratio in (("torchvision", 1.0), ("array", 2.5))
    ]
    reader = row_of({"part": "reader"}, "folder", **spread)
    shown = table(tmp_path, "loader", [*contest, reader])
    assert "| array | 1234 (900.0-2000) | 2.50 (1.00-9.00) |" in shown
    assert "folder" not in shown


def test_kernels_table_has_a_line_per_operation_type_and_class_of_machine(tmp_path: Path) -> None:
    def case(benchmark: str, sizes: dict[str, Any], **ms: float) -> Rows:
        cell = {"device": "cpu"} | sizes
        extra = {"official": 2**21, "compiled": 2**21}
        return [
            row_of(cell, name, benchmark=benchmark, p50_ms=x, peak_extra_bytes=extra.get(name, 0))
            for name, x in ms.items()
        ]

    made = [
        *case("convolution", {"side": 8}, official=6.0, direct=4.0, winograd=3.0),
        *case("convolution", {"side": 7}, official=6.0, direct=4.0),
        *case("info_nce", {"dtype": "float32"}, official=8.0, compiled=3.0, fastmoco=2.0),
        *case("info_nce", {"dtype": "bfloat16"}, official=9.0, fastmoco=1.0),
        *case("max_pool", {}, official=1.0, fastmoco=1.0),  # of a kernel that is no more
        *case("max_pool", {"device": "cuda"}, official=4.0, compiled=2.0, fastmoco=1.0),
        *case("photometric", {}, eager=6.0, fastmoco=2.0),
    ]
    assert table(tmp_path, "kernels", made).splitlines()[2:] == [
        "| convolution, avx2 (2) | 6.00 | 3.00-4.00 | **1.50-2.00** | - | 0.00 of 2.00 |",
        "| InfoNCE float32, avx2 (1) | 8.00 | 2.00 | **4.00** | 1.50 | 0.00 of 2.00 |",
        "| InfoNCE bfloat16, avx2 (1) | 9.00 | 1.00 | **9.00** | - | 0.00 of 2.00 |",
        "| max pooling, avx2 (1) | 4.00 | 1.00 | **4.00** | 2.00 | 0.00 of 2.00 |",
        "| photometric augmentation, avx2 (1) | 6.00 | 2.00 | **3.00** | - | 0.00 of 0.00 |",
    ]
    assert table(tmp_path, "kernels", case("max_pool", {}, official=1.0)) == tables.NO_ROW


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operation_that_is_raced_has_a_name_in_the_table(device: str) -> None:
    assert set(races(torch.device(device))) <= set(tables.OPERATIONS)


def test_ablation_has_a_column_per_case_and_leaves_out_our_step_itself(tmp_path: Path) -> None:
    def part(name: str, contestant: str, p50: float, **more: Any) -> Rows:
        ours = {"relative": [1.0, 1.0, 1.0], "n": 3}
        other = {"relative": [p50 - 0.1, p50, p50 + 0.1], "n": 3}
        case = {"part": name}
        return [row_of(case, "nothing", **ours, **more), row_of(case, contestant, **other, **more)]

    elsewhere = {"extension": "avx512_bf16", "date": "2026-01-02"}
    shown = table(
        tmp_path,
        "ablation",
        [
            *part("switches", "old", 9.0, environment={"commit": "before"}),
            *part("switches", "bf16", 2.0, environment={"date": "2026-01-02"}),
            *part("data", "array loader", 3.0),
            *part("switches", "bf16", 5.0, environment=elsewhere),
            *part("switches", tables.GONE, 1.0, environment=elsewhere),
            *part("waterfall", "published step", 4.0),
        ],
    )
    assert shown.splitlines()[0].endswith(", avx2 | resnet18, 32 px, batch 8, bf16, avx512_bf16 |")
    assert "| bf16 | 2.00 (1.90-2.10) | 5.00 (4.90-5.10) |" in shown
    for absent in ("old", "published", "nothing", "array loader", "max pooling"):
        assert absent not in shown


def test_profile_leaves_out_parts_below_one_percent(tmp_path: Path) -> None:
    shares = [
        {"convolution": 60.0, "data": 5.0, "pooling": 0.9},
        {"convolution": 20.0, "loss": 70.0},
    ]
    made = [row_of({"batch": i}, "-", shares=share) for i, share in enumerate(shares)]
    shown = table(tmp_path, "profile", made)
    assert shown.splitlines()[0] == "| percent of the time | loss | convolution | data |"
    assert "| 0.0 | 60.0 | 5.0 |" in shown


def test_text_outside_the_markers_stays(tmp_path: Path) -> None:
    text = "a\n<!-- bench:throughput -->\nold\n<!-- /bench:throughput -->\nb\n"
    new = tables.with_tables(text, tmp_path)
    assert new.startswith("a\n<!-- bench:throughput -->\nNo row")
    assert new.endswith("<!-- /bench:throughput -->\nb\n")
    assert tables.with_tables(new, tmp_path) == new
    with pytest.raises(ValueError, match="/bench:throughput --> closes"):
        tables.with_tables("<!-- bench:throughput -->", tmp_path)
    with pytest.raises(ValueError, match="no <!-- bench:model -->"):
        tables.between(text, "model", "new")


def test_documents_are_not_stale() -> None:
    assert tables.main(["--check"]) == 0, "run make bench-report"


def test_every_committed_row_says_who_was_timed_and_where() -> None:
    for file in sorted(RESULTS.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            assert "contestant" in row or file.stem == "profiling", file
            assert {"extension", "commit", "date", "dirty", "command"} <= set(row["environment"])


def test_stale_file_is_found_and_mended(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("<!-- bench:throughput -->\nold\n<!-- /bench:throughput -->\n")
    assert tables.main(["--check", "--file", str(file)]) == 1
    assert tables.main(["--file", str(file)]) == 0
    assert tables.main(["--check", "--file", str(file)]) == 0


def test_figures_have_about_four_digits() -> None:
    assert [figure(x) for x in (2051.22, 117.43, 25.214, 1.5)] == [
        *("2051", "117.4", "25.21", "1.50")
    ]
