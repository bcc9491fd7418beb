"""Each alarm in a real run that is driven into the failure; none in a healthy one.

Small encoders on four batches of noise that come again and again: there is something to learn, and
sixty steps take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import fastmoco.method.step
from fastmoco.run.record import read_metrics
from fastmoco.train import main
from fastmoco_kernels import InfoNCE, info_nce

SMALL = [
    *(
        "--data.source",
        "synthetic",
        "--data.synthetic_samples",
        "640",
        "--augment.image_size",
        "16",
    ),
    *("--model.arch", "resnet18", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.dim", "16", "--moco.queue_size", "64", "--optim.global_batch_size", "32"),
    *("--moco.bn_group_size", "8", "--run.device", "cpu", "--run.precision", "fp32"),
    *("--run.log_every", "10", "--optim.schedule", "step"),
]


def warnings(
    folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, steps: int = 60
) -> list[str]:
    """What a run of these options warns of."""
    capsys.readouterr()
    options = [*SMALL, "--run.max_steps", str(steps), *arguments, "--run.dir", str(folder)]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: ")]


def test_a_healthy_run_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Although loss and rank look bad in its first steps; and most of it lies after the tenth."""
    assert warnings(tmp_path, capsys, "--optim.epochs", "5") == []
    records = [r.values for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert records[1]["loss"] > 0.99 * records[1]["loss_random"]
    assert records[1]["effective_rank_q"] < 0.7 * records[0]["effective_rank_q"]
    assert min(r["queue_change"] for r in records if "queue_change" in r) > 0.1


def test_collapse_by_a_high_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collapse, *_ = warnings(tmp_path, capsys, "--optim.lr", "30")
    assert collapse.startswith("features collapse: the effective rank of the queries is 1.")
    assert "lower optim.lr" in collapse


def test_pretext_accuracy_without_learning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shuffled BN, keys that follow at once and a low temperature: the shortcut of a few steps.

    Resumed in between, the run still knows what the untrained encoder was worth.
    """
    options = ["--moco.shuffle_bn", "none", "--moco.momentum", "0.9", "--moco.temperature", "0.07"]
    told = warnings(tmp_path, capsys, *options, steps=30)
    told += warnings(tmp_path, capsys, *options)
    (easy,) = [line for line in told if line.startswith("pretext accuracy is 9")]
    assert "moco.shuffle_bn" in easy
    assert "(untrained encoder " in easy


def test_loss_of_a_random_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stuck,) = warnings(tmp_path, capsys, "--optim.lr", "1e-6")
    assert "is that of a random guess, ln(1+K) = 4.174: the encoder is not learning" in stuck


def test_a_queue_that_is_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broken kernel would leave it."""

    def forgets(q: Tensor, k: Tensor, _: Tensor, queue: Tensor, ptr: Tensor, T: Any) -> InfoNCE:
        return info_nce(q, k, queue, T)

    monkeypatch.setattr(fastmoco.method.step, "info_nce_enqueue", forgets)
    told = warnings(tmp_path, capsys)
    assert any(line.startswith("the queue no longer changes") for line in told)


def test_rank_below_the_untrained_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate at which features use fewer and fewer directions, after the first tenth."""
    told = warnings(tmp_path, capsys, "--optim.lr", "0.1", "--optim.epochs", "5")
    (below,) = [line for line in told if "is below the untrained encoder's" in line]
    assert "effective rank of the queries" in below
