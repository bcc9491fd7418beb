"""Steps whose loss or gradient is not finite: every rank sees them, and `skip` leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastmoco.config import Config
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.memory_bank import MemoryBankStep, allocate_bank
from fastmoco.method.nonfinite import any_not_finite, telling
from fastmoco.method.optim.update import set_lr
from fastmoco.method.step import Step
from tests.support.ranks import Ranks
from tests.support.tiny import BATCH, CONFIG, LR, ONE, SAMPLES, build_tiny, images

# To the bit the compiled step equals what eager mode does on CUDA; the CPU has a kernel of its own.
aten_batch_norm = mock.patch(
    "fastmoco.network.batchnorm.supports", new=mock.Mock(return_value=False)
)


def changed(**groups: dict[str, Any]) -> Config:
    """The tiny configuration, `skip`, and other values in some groups."""
    groups.setdefault("run", {})
    groups["run"]["nonfinite"] = "skip"
    return replace(CONFIG, **{n: replace(getattr(CONFIG, n), **v) for n, v in groups.items()})


KINDS = {
    "queue": changed(),
    "several parts": changed(optim={"accumulate": 2}),
    "symmetric": changed(moco={"symmetric": True}),
    "sgd": changed(optim={"name": "sgd"}),
    "lars": changed(optim={"name": "lars"}),
    "end_to_end": changed(moco={"mechanism": "end_to_end"}, optim={"name": "sgd"}),
    "memory_bank": changed(moco={"mechanism": "memory_bank"}, optim={"name": "sgd"}),
}


def build(config: Config, world: World = ONE, backend: str | None = None) -> Step:
    """A step whose encoders have parted, so that a move of encoder_k would be seen."""
    torch._dynamo.reset()
    counters.clear()
    moco = build_tiny(config, config.local_batch_size(world.size) if backend else 4)
    allocate_bank(config, moco, SAMPLES)
    if moco.encoder_k is not moco.encoder_q:
        with torch.no_grad():
            for p in moco.encoder_k.parameters():
                p.mul_(1.25)
    step = build_step(config, moco, world, compile_encoders=backend is not None)
    return step if backend is None else replace(step, backend=backend)  # type: ignore[call-arg]


def run(step: Step, world: World, parts: int, numbers: list[int], bad: list[int]) -> list[bool]:
    """Steps of these numbers; in the `bad` ones a pixel of the last rank is NaN. Flags of all."""
    flags, local = [], BATCH // world.size // parts
    for number in numbers:
        set_lr(step.optimizer, LR)
        views = images(number)
        im_q, im_k = views.im_q.float(), views.im_k.float()
        if number in bad:
            keys = number % 2 and not isinstance(step, MemoryBankStep)  # which looks at none
            (im_k if keys else im_q)[-1, 3, 2, 1] = torch.nan
        batches = []
        for part in range(parts):
            first = (part * world.size + world.rank) * local
            rows = slice(first, first + local)
            batches.append(Batch(im_q[rows], im_k[rows], views.replaced[rows]))
        flags.append(bool(step(batches, number).not_finite))
    return flags


def state(step: Step) -> list[Tensor]:
    """Weights, BN statistics and counts, queue and cursor or bank, momenta."""
    momenta = [step.optimizer.state[p]["momentum_buffer"] for p in step.moco.encoder_q.parameters()]
    return [t.detach().clone() for t in (*step.moco.state_dict().values(), *momenta)]


def skipped(world: World, config: Config) -> tuple[list[bool], bool]:
    """Flags, and whether the bad steps might as well not have been."""
    parts = config.optim.accumulate
    step, never = build(config, world), build(config, world)
    flags = run(step, world, parts, [0, 1, 2, 3, 4], [0, 3])
    run(never, world, parts, [1, 2, 4], [])
    return flags, all(torch.equal(a, b) for a, b in zip(state(step), state(never), strict=True))


BAD = [True, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_skipped_step_nothing_stays(kind: str) -> None:
    assert skipped(ONE, KINDS[kind]) == (BAD, True)


@pytest.mark.parametrize("kind", ["queue", "memory_bank"])
def test_what_one_rank_meets_every_rank_skips(two_ranks: Ranks, kind: str) -> None:
    assert two_ranks.run(skipped, KINDS[kind]) == [(BAD, True)] * 2


ONE_GRAPH = changed(run={"compile": "on"}, moco={"bn_group_size": 0})


def put_back(world: World, backend: str) -> tuple[Any, ...]:
    """Flags, whether a bad third step leaves the state of the second, graphs, graph breaks."""
    step = build(ONE_GRAPH, world, backend)
    flags = run(step, world, 1, [0, 1], [])
    before = state(step)
    flags += run(step, world, 1, [3], [3])
    same = all(torch.equal(a, b) for a, b in zip(before, state(step), strict=True))
    flags += run(step, world, 1, [4], [])
    moved = not torch.equal(before[0], state(step)[0])
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    return flags, same, moved, graphs, breaks


@aten_batch_norm
def as_one_graph(world: World) -> tuple[Any, ...]:
    return put_back(world, "aot_eager")


AS_ONE = ([False, False, True, False], True, True, 1, 0)


def test_in_one_graph_on_two_ranks_too(two_ranks: Ranks) -> None:
    assert two_ranks.run(as_one_graph) == [AS_ONE] * 2


def test_what_inductor_makes_of_it_is_one_graph_as_well() -> None:
    assert put_back(ONE, "inductor") == AS_ONE


def test_under_stop_a_bad_step_is_told_and_nothing_is_copied() -> None:
    config = replace(CONFIG, run=replace(CONFIG.run, nonfinite="stop"))
    step = build(config)
    assert step.guard.keep().flats == []
    assert run(step, ONE, 1, [0, 1, 2], [1]) == [False, True, True]
    assert not all(t.isfinite().all() for t in state(step))


def test_a_scaler_may_overflow_and_only_a_bad_loss_counts() -> None:
    step = build(changed(run={"precision": "fp16"}))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    step.guard._scaler = step.scaler
    q, k = ([p.detach().clone() for p in params] for params in step.moco.parameter_pairs())
    assert run(step, ONE, 1, [0], []) == [False]
    assert step.scaler.get_scale() == 2.0**119  # it has overflowed
    assert int(step.moco.queue_ptr) == BATCH  # and so the keys are good
    assert all(torch.equal(*pair) for pair in zip(q, step.moco.encoder_q.parameters(), strict=True))
    assert not torch.equal(k[0], next(step.moco.encoder_k.parameters()))
    kept = [t.clone() for t in step.moco.state_dict().values()]
    assert run(step, ONE, 1, [1], [1]) == [True]
    assert all(torch.equal(*p) for p in zip(kept, step.moco.state_dict().values(), strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_bad_loss_makes_every_gradient_bad_and_a_good_one_changes_no_bit(value: float) -> None:
    """A sum that overflows has a finite gradient by itself."""
    x = torch.tensor([1.0, 1 / 3, -7e-12], requires_grad=True)
    (bad,) = torch.autograd.grad(telling(x.sum() + value), x)
    assert bad.isnan().all()
    (good,) = torch.autograd.grad(telling(x.exp().sum()), x)
    assert torch.equal(good, x.detach().exp())


def test_every_place_and_kind_of_a_bad_value_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (8, 4, 3, 3), (1,), (257, 65)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[2][0] = torch.finfo(torch.float32).max  # the sum of squares would overflow
    assert not any_not_finite(tensors)
    for tensor in tensors:
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).view(-1)
        for place in {0, len(flat) // 2, len(flat) - 1}:
            good = float(flat[place])
            for bad in (torch.nan, torch.inf, -torch.inf):
                flat[place] = bad
                assert any_not_finite(tensors)
            flat[place] = good
    assert not any_not_finite(tensors)
