"""The README's tables come from rows, and a stale one is found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.measure import terminal
from bench.measure.case import case_of
from bench.measure.contest import Result, Window
from bench.pages import tables
from bench.throughput import ratios_of, summary
from fastmoco.config import Config

WHERE = {
    "device": "cpu",
    "cpu": "a processor",
    "threads": 2,
    "commit": "0123456789",
    "load_average": 0.5,
    "dirty": False,
}
FACTS = {"peak_memory_gib": 1.5, "host_syncs": 0, "threads": 2}


def rows(date: str, factor: float, dirty: bool = False) -> list[dict[str, object]]:
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
    return [
        {**shared, "contestant": name, **summary(result, 256)} for name, result in results.items()
    ]


def write(path: Path, *contests: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for rows_ in contests for row in rows_))


def test_table_shows_the_latest_clean_run(tmp_path: Path) -> None:
    write(
        tmp_path / "throughput.jsonl",
        rows("2026-01-01", 2.0),
        rows("2026-01-02", 3.0),
        rows("2026-01-03", 9.0, dirty=True),
    )
    table = tables.table("throughput", tmp_path)
    assert "| **our step** | 256.0 | 256.0 - 256.0 | 2.000 | 1.50 GiB | 0 |" in table
    assert "our step / published step: **3.00** (3.00 - 3.00)" in table
    assert table.count("published step |") == 1


def test_tables_of_the_loader_and_of_the_index(tmp_path: Path) -> None:
    where = {**WHERE, "date": "2026-01-01"}
    spread = {"p20": 900.0, "p50": 1234.5, "p80": 2000.0, "n": 21}
    case = {"part": "pipeline", "unit": "images/s"}
    contest = [
        {"case": case, "contender": name, **spread, "ratios": [1, ratio, 9], "environment": where}
        for name, ratio in (("torchvision", 1.0), ("array", 2.5))
    ]
    reader = {**contest[0], "case": {"part": "reader", "unit": "samples/s"}, "contender": "folder"}
    del reader["ratios"]
    write(tmp_path / "loader.jsonl", [*contest, reader])
    table = tables.table("loader", tmp_path)
    assert "| array | 1,234.50 | 900.00 - 2,000.00 | **2.50** (1.00 - 9.00) |" in table
    assert "| folder | 1,234.50 | 900.00 - 2,000.00 |\n" in table + "\n"
    first = {"gained_bytes": 84e6, "own_bytes": 46e6, "peak_bytes": 93e6, "index_bytes": 38e6}
    about = {"case": {"files": 10**6, "folders": 1000}, **spread, "environment": where}
    write(
        tmp_path / "index.jsonl",
        [{**about, "contender": "first", **first}, {**about, "contender": "batch"}],
    )
    table = tables.table("index", tmp_path)
    assert "| 21 | 84.0 bytes | 46.0 bytes | 93.0 bytes |" in table
    assert "| batch | 1234.500 | 900.000 - 2000.000 | 21 | - | - | - |" in table


def test_table_of_weight_gradients_leaves_out_other_races(tmp_path: Path) -> None:
    case = {"n": 32, "c": 512, "side": 15, "o": 256, "k": 3, "stride": 2, "device": "cpu"}
    shared = {"benchmark": "weight_gradient", "case": case, "n": 40}
    where = {**WHERE, "date": "2026-01-01"}
    contest: list[dict[str, object]] = [
        {**shared, "contender": name, "p50_ms": ms, "environment": where}
        for name, ms in (("official", 6.0), ("fastmoco", 4.0))
    ]
    other = {**contest[0], "benchmark": "batch_norm", "contender": "compiled"}
    write(tmp_path / "kernels.jsonl", [other])
    assert tables.table("weight_gradient", tmp_path) == "No row has been published yet."
    write(tmp_path / "kernels.jsonl", [*contest, other])
    flops = 2 * 32 * 8 * 8 * 256 * 512 * 9  # 15 columns at stride 2 are 8
    rates = " | ".join(f"{flops / ms / 1e6:.0f}" for ms in (6, 4))
    line = f"| 32x512x15x15 to 256, 3x3, stride 2 | 6.00 ms | 4.00 ms | **1.50** | {rates} |"
    assert tables.table("weight_gradient", tmp_path).splitlines()[-1] == line


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


def test_readme_is_not_stale() -> None:
    assert tables.main(["--check"]) == 0, "run make bench-report"


def test_stale_file_is_found_and_mended(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("<!-- bench:throughput -->\nold\n<!-- /bench:throughput -->\n")
    assert tables.main(["--check", "--file", str(file)]) == 1
    assert tables.main(["--file", str(file)]) == 0
    assert tables.main(["--check", "--file", str(file)]) == 0


def test_figures_have_about_four_digits() -> None:
    assert [tables.figure(x) for x in (2051.22, 117.43, 25.214, 1.5)] == [
        *("2051", "117.4", "25.21", "1.50")
    ]


def test_columns_of_a_gpu_stand_only_where_a_row_has_them() -> None:
    plain = rows("2026-01-01", 2.0)
    headers, _ = tables.cells(plain)
    assert "power" not in headers
    assert "kernel launches per step" not in headers
    on_gpu = [dict(row) for row in plain]
    on_gpu[0] |= {"power_w": 612.4, "kernel_launches": 321, "kwh_per_million_images": 0.04567}
    headers, body = tables.cells(on_gpu)
    first, second = (dict(zip(headers, line, strict=True)) for line in body)
    assert first["power"] == "612 W"
    assert first["kernel launches per step"] == "321"
    assert first["kWh per million images"] == "0.0457"
    assert second["power"] == "-"


def test_narrow_terminal_shows_every_digit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    contest = rows("2026-01-01", 2.0)
    headers, body = tables.cells(contest)
    terminal.show(
        tables.caption(contest), headers, [*body, *body, body[0]], tables.sentence(contest)
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "\u2026" not in printed
    assert printed.count("256.0-256.0") == 3
    assert "|" not in printed.split("our step / published")[0]


def row_of(case: dict[str, object], date: str, **more: object) -> dict[str, object]:
    """A row of the kinds that stand beside the contest's."""
    whole = {"arch": "resnet18", "image_size": 32, "batch": 8, "queue_size": 64} | case
    return {"case": whole | {"precision": "bf16"}, "environment": {**WHERE, "date": date}, **more}


def test_ablation_shows_all_parts_of_a_case_and_leaves_out_our_step_itself(tmp_path: Path) -> None:
    def part(name: str, date: str, contestant: str, p50: float) -> list[dict[str, object]]:
        ours = {"contestant": "nothing", "relative": [1.0, 1.0, 1.0], "relative_cpu": 1.0, "n": 3}
        other = {"contestant": contestant, "relative": [p50 - 0.1, p50, p50 + 0.1], "n": 3}
        case: dict[str, object] = {"part": name}
        return [
            row_of(case, date, **ours),
            row_of(case, date, **other, relative_cpu=p50),
        ]

    write(
        tmp_path / "ablation.jsonl",
        part("switches", "2026-01-01", "old", 9.0),
        part("switches", "2026-01-02", "bf16 (fp32 instead)", 2.0),
        part("data", "2026-01-02", "array loader (dali instead)", 3.0),
        part("compile", "2026-01-03", "run.compile off (on instead)", 5.0),
        part("waterfall", "2026-01-03", "published step", 4.0),
    )
    table = tables.table("ablation", tmp_path)
    assert "| bf16 (fp32 instead) | 2.00 | 1.90 - 2.10 | 2.00 |" in table
    assert "| array loader (dali instead) | 3.00 |" in table
    first, second = table.split("\n\nresnet18")  # a run of its own has a caption of its own
    assert first.count("| switched off |") == second.count("| switched off |") == 1
    assert "| run.compile off (on instead) | 5.00 |" in second
    for absent in ("old", "published", "nothing"):
        assert absent not in table


def test_tables_of_threads_and_profiles(tmp_path: Path) -> None:
    setting = {"contestant": "1 thread", "relative": [1.1, 1.2, 1.3], "p50_images_per_second": 50.0}
    write(tmp_path / "threads.jsonl", [row_of({"beside": "loader"}, "2026-01-01", **setting)])
    assert "fed by its loader | 1 thread | 50.00 | 1.20 |" in tables.table("threads", tmp_path)
    shares = [{"convolution": 60.0, "data": 5.0}, {"convolution": 20.0, "loss": 70.0}]
    contests = [
        [row_of({"batch": i}, "2026-01-01", shares=share, threads=2)]
        for i, share in enumerate(shares)
    ]
    write(tmp_path / "profile.jsonl", *contests)
    table = tables.table("profile", tmp_path)
    assert table.splitlines()[0] == "| | loss | convolution | data |"
    assert "| 0.0 % | 60.0 % | 5.0 % |" in table
