"""`fastmoco report RUN_DIR [RUN_DIR ...]`: what a run has learned, on one page.

Writes `curves.png` into every run directory and `report.html` into the first. It reads records
only, so it works while a run trains.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.run.curves import draw_curves
from fastmoco.run.html_report import NAME, write_report
from fastmoco.run.record import knn_summary, train_summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2, with one sentence, where there is no run."""
    parser = CommandParser(
        prog="fastmoco report", description="One HTML page about a run, or several compared."
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory with metrics.jsonl")
    parser.add_argument("--out", type=Path, help=f"page to write; default RUN_DIR/{NAME}")
    given = parser.parse_args(arguments)
    folders: list[Path] = given.run_dir
    out = given.out or folders[0] / NAME
    try:
        for folder in folders:
            metrics = folder / "metrics.jsonl"
            draw_curves(metrics, folder / "curves.png")
            name = f"{folder}: " if len(folders) > 1 else ""
            print(name + train_summary(metrics), knn_summary(metrics), sep="\n")
            print(folder / "curves.png")
        write_report(folders, out)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
