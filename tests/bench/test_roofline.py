"""The tables of the model, made from rows of the ledger."""

from __future__ import annotations

from typing import Any

from bench.roofline import H100, Kernel, by_part, counts, kernels_of, model

ROW: dict[str, Any] = {
    "case": {"ranks": 8, "batch": 32},
    "environment": {"commit": "abcdef0123"},
    **{"launches": 700, "gb_moved": 12.5, "atomics": 1, "generated_kernels": 90},
    "kernels": [["pointwise", 10, 1, 29 * 10**7, 0, 1], ["convolutions", 1, 2, 0, 5934 * 10**9, 0]],
}


def test_times_of_equal_parts_add_up() -> None:
    kernels = kernels_of(ROW)
    assert kernels[0] == Kernel("pointwise", 10, 1, 29 * 10**7, 0, 1)
    times = by_part([*kernels, kernels[0]], H100)
    assert {part: round(ms, 1) for part, ms in times.items() if ms} == {
        "pointwise": 2.0,
        "convolutions": 10.0,
    }


def test_the_tables_name_case_commit_and_rate() -> None:
    assert counts([ROW])[-1] == "| 32 images on each of 8, abcdef0 | 700 | 12.5 | 1 | 90 |"
    lines = model([ROW])
    assert len(lines) == 2 + 3  # a line per GPU
    # 256 pairs in 1 ms of pointwise kernels and 10 ms of convolutions
    assert lines[3].startswith("| H100 SXM, 32 images on each of 8 | 10.0 | 1.0 | 0.0 |")
    assert lines[3].endswith("| 11.0 | 23274 |")
