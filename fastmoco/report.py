"""`fastmoco report RUN_DIR [RUN_DIR ...]`: what a run has learned, on one page.

Writes `curves.png` into every run directory and `report.html` into the first. It reads records
only, so it works while a run trains. With `--data.root` it also draws what the first and the last
checkpoint of the run hold to be alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.machine.stopping import exit_code
from fastmoco.run.curves import draw_curves
from fastmoco.run.page.html_report import NAME, Picture, write_report
from fastmoco.run.record import METRICS, knn_summary, train_summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2, with one sentence, where there is no run."""
    parser = CommandParser(
        prog="fastmoco report", description="One HTML page about a run, or several compared."
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory with metrics.jsonl")
    parser.add_argument("--out", type=Path, help=f"page to write; default RUN_DIR/{NAME}")
    parser.add_argument(
        "--data.root",
        dest="root",
        help="folder with train and test/val: draw nearest images and a map of features",
    )
    given = parser.parse_args(arguments)
    folders: list[Path] = given.run_dir
    out = given.out or folders[0] / NAME
    try:
        for folder in folders:
            metrics = folder / METRICS
            draw_curves(metrics, folder / "curves.png")
            name = f"{folder}: " if len(folders) > 1 else ""
            print(name + train_summary(metrics), knn_summary(metrics), sep="\n")
            print(folder / "curves.png")
        if given.root and len(folders) > 1:
            raise ConfigError("--data.root draws the features of one run: name one run directory.")
        drawn = _pictures(folders[0], given.root) if given.root else []
        write_report(folders, out, drawn)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def _pictures(folder: Path, root: str) -> list[Picture]:
    # Imported here: a report of records alone needs no torch.
    import torch

    from fastmoco.evaluate.report_pictures import pictures

    return pictures(folder, root, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
