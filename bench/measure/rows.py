"""Rows: what was measured, of what and where; appended to `bench/results` and read from there.

A row has `benchmark`, `case` (rows of equal cases are comparable), `contestant` (who was timed),
its numbers, and `environment`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.config import Config, ConfigError
from fastmoco.machine.precision import choose_precision
from fastmoco_kernels import processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(os.environ.get("BENCH_RESULTS", ROOT / "bench" / "results"))
Row = dict[str, Any]


def quantiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """p20, p50 and p80, interpolated linearly and rounded."""
    return [round(float(value), digits) for value in np.quantile(values, [0.2, 0.5, 0.8])]


def spread(values: Sequence[float], digits: int = 4, unit: str = "") -> Row:
    """p20, p50, p80 (`p20_ms` with the unit ms) and n of measurements, as they stand in a row."""
    names = (f"p{p}_{unit}".rstrip("_") for p in (20, 50, 80))
    return dict(zip(names, quantiles(values, digits), strict=True)) | {"n": len(values)}


def device_of(config: Config) -> torch.device:
    """The device that a run of this configuration uses."""
    cuda = torch.cuda.is_available() and config.run.device != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def case_of(config: Config) -> Row:
    """What a row about the step of this configuration is about."""
    precision = choose_precision(config.run.precision, device_of(config))
    return {
        "arch": config.model.arch,
        "width": config.model.width,
        "image_size": config.augment.image_size,
        "batch": config.optim.global_batch_size,
        "queue_size": config.moco.queue_size,
        "precision": precision.name,
        "precision_why": precision.why,
        "compile": config.run.compile,
        "shuffle_bn": config.shuffle_bn(1),
        "bn_group_size": config.bn_group_size(1),
        "data": config.data.source,
    }


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # a bare image has no git
        return ""


def _git(*arguments: str) -> str:
    return _said("git", "-C", str(ROOT), *arguments)


def _differing() -> list[str]:
    """Files that differ from the commit, or that it does not have; rows do not count."""
    found = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return [line.split()[-1] for line in found.splitlines()]


def _version(*packages: str) -> str | None:
    found = (one.version for one in metadata.distributions() if one.name in packages)
    return next(found, None)


def _gpu(device: torch.device) -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    query = (f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}")
    told = _said("nvidia-smi", *query, "--format=csv,noheader")
    return dict(zip(fields, told.split(", "), strict=False)) if told else {}


def environment(device: torch.device) -> Row:
    """Everything a reader needs to judge a number: hardware, versions, commit, load, command."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "gpu": _gpu(device) if cuda else {},
        "cpu": next((x.split(": ")[1] for x in processor.lines() if "model name" in x), "unknown"),
        "extension": processor.best(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dali": _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT", ""),
        "dirty": bool(_differing()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def origin(device: torch.device, publish: bool) -> Row:
    """The environment of rows (`environment`); take it before anything is measured.

    Where there is no git, the variable BENCH_COMMIT names the commit. Raises `ConfigError` where
    rows are to be published of a tree that differs from its commit, or whose commit nobody names.
    """
    where = environment(device)
    if publish and not where["commit"]:
        raise ConfigError("No commit is known here: name it in the variable BENCH_COMMIT.")
    if publish and where["dirty"]:
        first = ", ".join(_differing()[:3])
        raise ConfigError(
            f"The tree differs from its commit ({first}), so no row may be kept: commit first."
        )
    return where


def append_rows(name: str, rows: Iterable[Mapping[str, Any]], where: Row) -> None:
    """Append one JSON line per row, with its environment, to `NAME.jsonl` in `RESULTS`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({**row, "environment": where}) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of one results file; none if it is not there. Rows of a dirty tree do not count."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [row for row in rows if not row["environment"]["dirty"]]


def latest(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of every case at its latest commit, in the order in which cases first appeared.

    Of each contestant the last one: who does not fit into memory beside others has runs of its own.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        where = {name: row["environment"].get(name) for name in ("device", "extension")}
        case = json.dumps([row.get("benchmark"), row["case"], where], sort_keys=True)
        cases.setdefault(case, []).append(row)
    found = []
    for case_rows in cases.values():
        case_rows.sort(key=lambda row: str(row["environment"]["date"]))
        commit = case_rows[-1]["environment"]["commit"]
        same = [row for row in case_rows if row["environment"]["commit"] == commit]
        found.append({row.get("contestant", ""): row for row in same})
    return found
