"""Training from Python: `fastmoco.train(config)`, in a script, a notebook or a thread."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmoco.config import Config, validated
from fastmoco.machine import ranks
from fastmoco.machine.stopping import StopRequest
from fastmoco.run.record import METRICS, read_metrics
from fastmoco.train import Run, join_world

UNGUARDED = 'call fastmoco.train below `if __name__ == "__main__":` in a script.'


@dataclass(frozen=True)
class Trained:
    """What a call of `train` leaves."""

    folder: Path
    """The run directory: checkpoints, metrics.jsonl, curves.png, TensorBoard events."""
    metrics: dict[str, float]
    """The last value of every metric, named as in metrics.jsonl: `loss`, `step`, `knn_top1`..."""
    finished: bool
    """False where a signal stopped it: the same call then goes on from there."""


def train(config: Config) -> Trained:
    """Train as `python -m fastmoco.train` does, on one process or, under torchrun, on several.

    Prints the same lines. Ctrl-C, or interrupting a notebook, saves a checkpoint and returns; in a
    thread that is not the main one signals are left alone. Random state and number of threads of
    torch are afterwards what they were. Reader processes import the script that calls this: call
    it below `if __name__ == "__main__":` there.

    Raises `ConfigError` for a configuration or input that cannot train, `DivergedError` where the
    loss stops being a number, `DisagreementError` and `CollectiveError` where a rank fails.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(f"fastmoco: {UNGUARDED}")  # in a process of the reader, on its way up
    config = validated(config)
    threads, device = torch.get_num_threads(), torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if device else []):
            with StopRequest() as request:
                run = Run(config, join_world(config), request)
                run.train()
            main = run.world.is_main
    finally:
        ranks.stop()
        torch.set_num_threads(threads)
    metrics = last_metrics(run.folder / METRICS) if main else {}
    return Trained(run.folder, metrics, run.finished)


def last_metrics(metrics_jsonl: Path) -> dict[str, float]:
    """The last value of every metric in the record of a run."""
    last: dict[str, float] = {}
    for record in read_metrics(metrics_jsonl):
        last |= {"step": record.step, "epoch": record.epoch, **record.values}
    return last
