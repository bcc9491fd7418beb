"""Switching an improvement off changes its cost and not what is learned."""

from __future__ import annotations

import pytest
import torch

from bench.ablation import EVERYTHING, VARIANTS, rows_of, variants
from bench.contest import Result, Window
from bench.machines import WITHOUT, numbered_step
from fastmoco.config import dump, parse

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def queue_after_two_steps(without: tuple[str, ...]) -> torch.Tensor:
    step, run, _ = numbered_step(dump(parse(TINY)), without)
    for name in without:
        run = WITHOUT[name](run, step)
    run()
    run()
    return step.moco.queue


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_what_is_switched_off_does_not_change_the_keys(name: str) -> None:
    apart = queue_after_two_steps((name,)) - queue_after_two_steps(())
    assert float(apart.abs().max()) < 1e-3


def test_rows_are_relative_to_the_whole() -> None:
    results = {
        EVERYTHING: Result([Window(1, 2.0, 4.0, 0.0)] * 3, {}),
        "other": Result([Window(1, 3.0, 8.0, 0.0)] * 3, {}),
    }
    rows = rows_of(results, {"benchmark": "ablation"})
    assert rows[0]["relative"] == [1.0, 1.0, 1.0]
    assert rows[1]["relative"] == [1.5, 1.5, 1.5]
    assert rows[1]["relative_cpu"] == 2.0


def test_variants_that_change_nothing_here_are_left_out() -> None:
    assert len(variants(cuda=True, with_compile=False, compiled=True)) == len(VARIANTS) - 1
    chosen = variants(cuda=False, with_compile=True, compiled=False)
    assert list(chosen.values())[-1].overrides == ("--run.compile", "on")
