"""A small experiment: its grid, its pictures, and the command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.data.two_classes import two_classes

ROOT = Path(__file__).resolve().parents[3]
GRID: dict[str, Any] = {
    "title": "Learning rates",
    "recipe": "demo",
    "x": {"label": "lr", "scale": "log"},
    "metrics": ["knn_top1"],
    "set": {
        **{"data.source": "folder", "data.backend": "array", "data.workers": 1},
        **{"augment.image_size": 32, "model.width": 0.125, "model.dim": 8, "run.device": "cpu"},
        **{"moco.queue_size": 16, "moco.bn_group_size": 4, "optim.global_batch_size": 8},
        **{"optim.epochs": 2, "knn.every": 1, "knn.k": 3, "run.log_every": 1},
    },
    "lines": {"MoCo": {"option": "optim.lr", "values": [0.01, 1e30]}},
    "seeds": [0],
}


def prepared(folder: Path, **change: Any) -> list[str]:
    two_classes(folder / "data" / "train", 24, 24, size=(32, 32), suffix="png")
    two_classes(folder / "data" / "test", 8, 8, size=(32, 32), suffix="png")
    (folder / "mine.yaml").write_text(yaml.safe_dump({**GRID, **change}))
    place = [f"--data.root={folder / 'data'}", f"--out={folder / 'out'}"]
    return [str(folder / "mine.yaml"), *place]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """The experiment as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastmoco.experiments", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
