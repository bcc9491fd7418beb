"""The waterfall of the ablation, docs/ablation.png: `python -m bench.pages.waterfall`.

`--check` changes nothing and exits 1 when the picture was drawn from other rows than there are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.ablation import EVERYTHING, PLAIN
from bench.measure.rows import RESULTS, ROOT, Row, latest, read_rows
from bench.pages.tables import caption

PICTURE = ROOT / "docs" / "ablation.png"
GRAY, BLUE, GREEN, RED, INK = "#8a929e", "#3564c4", "#3f9b6b", "#c4483c", "#2b2f36"


def bars(run: Sequence[Row]) -> list[tuple[str, float, float, str]]:
    """(label, left end, right end, colour) of every bar of a waterfall, in milliseconds per step.

    Totals begin at 0; a gain reaches from the time before it, on its right, to the time after it.
    """
    times = {row["contestant"]: float(row["step_ms"][1]) for row in run}
    order = [PLAIN, *run[0]["order"]]
    after = [times[name] for name in order[:-1]] + [times[EVERYTHING]]
    before = [next(iter(times.values())), *after[:-1]]
    labels = ["rewritten, all of the below off", *(f"+ {name}" for name in order[1:])]
    found = [("published step", 0.0, before[0], GRAY)]
    for label, start, end in zip(labels, before, after, strict=True):
        found.append((label, min(start, end), max(start, end), GREEN if end <= start else RED))
    return [*found, ("our step", 0.0, after[-1], BLUE)]


def draw(runs: Sequence[Sequence[Row]], path: Path, digest: str) -> None:
    """One panel per run, read from top to bottom: where the time of the published step went."""
    lines = [len(run[0]["order"]) + 3 for run in runs]
    figure = Figure(figsize=(9, sum(lines) * 0.36 + 1.1 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=lines)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        _panel(axes, run)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": digest})


def _panel(axes: Any, run: Sequence[Row]) -> None:
    found = bars(run)
    labels, lefts, rights, colours = zip(*found, strict=True)
    whole, places = max(rights), range(len(found))
    widths = [max(right - left, whole / 400) for _, left, right, _ in found]
    axes.barh(places, widths, left=lefts, color=colours, height=0.72)
    spread = {row["contestant"]: row["step_ms"] for row in run}
    states = [next(iter(spread)), PLAIN, *run[0]["order"][:-1], EVERYTHING, EVERYTHING]
    for place, (_, left, right, colour) in enumerate(found):
        low, _, high = spread[states[place]]
        axes.plot([low, high], [place, place], color=INK, linewidth=1.4, alpha=0.6)
        sign = "" if left == 0 else "-" if colour == GREEN else "+"
        text = f"{sign}{right - left:.0f} ms"
        text += f"   {right / rights[-1]:.2f} x ours" if place == 0 else ""
        axes.text(max(right, high) + whole / 90, place, text, va="center", fontsize=9, color=INK)
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, whole * 1.18)
    axes.set_xlabel("milliseconds per step: median over turns, lines from p20 to p80", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    head = caption(run[0]).replace(" (commit", f", {run[0]['n']} turns\n(commit")
    axes.set_title(head, fontsize=9, loc="left")


def published() -> tuple[list[list[Row]], str]:
    """The latest waterfall of every case, and a digest of what is drawn of it."""
    runs = latest(read_rows(RESULTS / "ablation.jsonl"))
    runs = [run for run in runs if run[0]["case"]["part"] == "waterfall"]
    text = json.dumps([[caption(run[0]), bars(run)] for run in runs])
    return runs, hashlib.sha256(text.encode()).hexdigest()[:16]


def is_stale(path: Path = PICTURE) -> bool:
    """Whether the picture is missing or was drawn from other rows; False where there is no row."""
    runs, digest = published()
    if not runs:
        return False
    if not path.is_file():
        return True
    with Image.open(path) as image:
        return bool(image.info.get("Source") != digest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when `--check` finds a stale picture."""
    parser = argparse.ArgumentParser("bench.pages.waterfall", description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args(arguments).check:
        return int(is_stale())
    if is_stale():
        runs, digest = published()
        draw(runs, PICTURE, digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
