"""The picture of the ablation from its rows: `python -m bench.figures` writes docs/ablation.png."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.ablation import EVERYTHING
from bench.harness import RESULTS, ROOT
from bench.report import Row, latest, read_rows

BLUE, INK = "#3564c4", "#2b2f36"


def draw_ablation(runs: Sequence[Sequence[Row]], path: Path) -> None:
    """One panel per run: how much longer a step takes with one thing switched off.

    Bars start at our step's own time and end at the median over turns; whiskers are p20 and p80.
    """
    figure = Figure(figsize=(9, 0.6 + 2.6 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, run in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        rows = sorted(
            (row for row in run if row["contestant"] != EVERYTHING),
            key=lambda row: float(row["relative"][1]),
        )
        p20, p50, p80 = ([row["relative"][i] for row in rows] for i in range(3))
        axes.barh(
            [f"without {row['contestant']}" for row in rows],
            [100 * (value - 1) for value in p50],
            xerr=[
                [100 * max(b - a, 0) for a, b in zip(p20, p50, strict=True)],
                [100 * max(c - b, 0) for b, c in zip(p50, p80, strict=True)],
            ],
            color=BLUE,
            ecolor=INK,
        )
        axes.axvline(0, color=INK, linewidth=0.8)
        case, where = run[0]["case"], run[0]["environment"]
        axes.set_xlabel("time of a step, per cent more than ours")
        axes.set_title(
            f"{case['arch']}, {case['image_size']} px, batch {case['batch']}, {where['device']}, "
            f"{where['threads']} thread(s), {rows[0]['n']} windows",
            fontsize=10,
        )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    """Exit code 0, or 1 where no row has been published."""
    runs = latest(read_rows(RESULTS / "ablation.jsonl"))
    if not runs:
        print("figures: no row in ablation.jsonl", file=sys.stderr)
        return 1
    draw_ablation(runs, ROOT / "docs" / "ablation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
