"""The same records as `metrics.jsonl` for a tracker of experiments: `run.tracker`.

One small adapter for Weights & Biases, MLflow and trackio, on the main rank only. A tracker that
fails costs a warning and its own later records, never the run. The number that a tracker gave the
run is kept in `tracker.json`, so that a resumed run goes on in the same place there.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fastmoco.config import Config, flatten
from fastmoco.run.record import Record

PROJECT = "fastmoco"
NAME = "tracker.json"


class Tracker(Protocol):
    """Where records go besides the run directory."""

    id: str
    """What the tracker calls this run."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Metrics of a step, by the names of `metrics.jsonl`."""

    def close(self, done: bool) -> None:
        """The run has ended, or was stopped and will go on."""


class _Wandb:
    """https://docs.wandb.ai/ref/python/: `init`, `log`, `finish`."""

    def __init__(self, name: str, settings: dict[str, Any], known: str) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=PROJECT, name=name, config=settings, id=known or None, resume="allow"
        )
        self.id = str(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _Trackio:
    """https://huggingface.co/docs/trackio: the interface of wandb; a run is known by its name."""

    def __init__(self, name: str, settings: dict[str, Any], known: str) -> None:
        import trackio

        self.id = known or name
        self._run: Any = trackio.init(
            project=PROJECT, name=self.id, config=settings, resume="allow"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, done: bool) -> None:
        self._run.finish()


class _Mlflow:
    """https://mlflow.org/docs/latest/python_api/mlflow.html: `start_run`, `log_metrics`, ..."""

    def __init__(self, name: str, settings: dict[str, Any], known: str) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=known or None, run_name=name)
        self.id = str(run.info.run_id)
        if not known:  # parameters cannot be changed later
            mlflow.log_params(settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self, done: bool) -> None:
        self._mlflow.end_run(status="FINISHED" if done else "KILLED")


_OPEN: dict[str, Callable[[str, dict[str, Any], str], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


@contextlib.contextmanager
def tracked(
    config: Config, warn: Callable[[str], None], finished: Callable[[], bool], *, enabled: bool
) -> Iterator[Callable[[Record], None]]:
    """Inside, what is yielded sends a record to `run.tracker`; where that is none, nowhere.

    `warn` takes the one sentence for a tracker that fails. A run that is not `finished` at the end
    was stopped and will go on. The packages are looked for by
    `fastmoco.config.check`, before anything starts.
    """
    kind, folder = config.run.tracker, Path(config.run.dir)
    tracker: Tracker | None = None

    def guarded(work: Callable[[], None]) -> None:
        nonlocal tracker
        try:
            work()
        except Exception as error:  # whatever the package, its server or the network raises
            tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"run.tracker {kind} failed and gets no more records ({reason}).")

    def begin() -> None:
        nonlocal tracker
        known = _known(folder, kind)
        settings = {name: str(value) for name, value in flatten(config).items()}
        tracker = _OPEN[kind](folder.name, settings, known)
        (folder / NAME).write_text(json.dumps({"tracker": kind, "id": tracker.id}))

    def send(record: Record) -> None:
        if (to := tracker) is not None:
            values = {n: float(v) for n, v in record.values.items() if math.isfinite(v)}
            guarded(lambda: to.log(values, record.step))

    if enabled and kind != "none":
        guarded(begin)
    try:
        yield send
    finally:
        if (last := tracker) is not None:
            done = sys.exc_info()[0] is None and finished()
            guarded(lambda: last.close(done))


def _known(folder: Path, kind: str) -> str:
    """What this tracker called the run when it began; empty if it did not."""
    try:
        kept = json.loads((folder / NAME).read_text())
        return str(kept["id"]) if kept["tracker"] == kind else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""
