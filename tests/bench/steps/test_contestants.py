"""Contestants know the FLOPs of their step, but for those that torch cannot look into."""

from __future__ import annotations

import torch

from bench.steps.contestants import Bench, bare_encoder, our_step
from fastmoco.config import dump, parse

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def test_flops_of_a_step_are_counted_on_the_cpu_only() -> None:
    facts = Bench(torch.device("cpu"), lambda: torch.ones(2, 3) @ torch.ones(3, 4)).facts()
    assert facts == {"threads": torch.get_num_threads(), "gflop_per_step": 0.0}
    facts = Bench(torch.device("cuda"), lambda: None).facts()
    assert facts == {"threads": torch.get_num_threads()}


def test_a_compiled_step_runs_while_its_facts_are_taken() -> None:
    text = dump(parse([*TINY, "--run.compile", "on"]))
    assert our_step(text).compiled
    assert bare_encoder(text).compiled
    x = torch.ones(8)
    graph = torch.compile(lambda: (x + 1).sum(), fullgraph=True, backend="eager")
    facts = Bench(torch.device("cpu"), graph, compiled=True).facts()
    assert "gflop_per_step" not in facts
