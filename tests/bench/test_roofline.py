"""The tables of the model, made from rows of the ledger."""

from __future__ import annotations

from typing import Any

from bench.roofline import H100, Kernel, by_part, counts, kernels_of, times

ROW: dict[str, Any] = {
    "case": {"ranks": 8, "batch": 32, "ops": ["max_pool", "max_pool_backward", "sgd_ema_"]},
    **{"launches": 700, "gb_moved": 12.5, "atomics": 1, "generated_kernels": 90},
    "kernels": [["pointwise", 10, 1, 29 * 10**7, 0, 1], ["convolutions", 1, 2, 0, 5934 * 10**9, 0]],
}


def test_times_of_equal_parts_add_up() -> None:
    kernels = kernels_of(ROW)
    assert kernels[0] == Kernel("pointwise", 10, 1, 29 * 10**7, 0, 1)
    found = by_part([*kernels, kernels[0]], H100)
    assert {part: round(ms, 1) for part, ms in found.items() if ms} == {
        "pointwise": 2.0,
        "convolutions": 10.0,
    }


def test_the_tables_name_case_ops_and_rate() -> None:
    (line,) = counts([{"": ROW}])[1]
    assert line == ["32 images on each of 8: max_pool, sgd_ema_", "700", "12.5", "1", "90"]
    later = [{"": ROW | {"launches": launches}} for launches in (700, 650, 600)]
    assert [line[1] for line in counts(later)[1]] == ["700", "600"]  # before and after
    headers, lines = times([{"": ROW}])
    assert len(lines) == 3  # a line per GPU
    h100 = dict(zip(headers, lines[1], strict=True))
    # 256 pairs in 1 ms of pointwise kernels and 10 ms of convolutions
    assert h100.pop("*modelled* ms") == "H100 SXM, 32 images on each of 8"
    assert {name for name, text in h100.items() if text != "0.0"} == {
        *("convolutions", "pointwise", "step", "pairs/s"),
    }
    assert (h100["convolutions"], h100["step"], h100["pairs/s"]) == ("10.0", "11.0", "23274")
