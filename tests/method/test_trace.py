"""What the step is to CUDA and to the compiler: one graph, no host synchronization."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import Config
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.optim.update import set_lr
from fastmoco.method.shuffle_bn import build_shuffle
from fastmoco.method.step import Step
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from fastmoco_kernels.network import batch_norm_cpu
from tests.support.gpu.fake_cuda import Watch, cuda_without_device, printed_by
from tests.support.ranks import Ranks
from tests.support.tiny import BATCH, CONFIG, LR, ONE, build_tiny, images

COMPILED = replace(CONFIG, run=replace(CONFIG.run, compile="on"))


def traced(arch: str, how: str, mechanism: str = "queue") -> dict[str, Any]:
    """What `tests.support.gpu.traced_step` prints, from a process of its own."""
    return printed_by("tests.support.gpu.traced_step", arch, how, mechanism)


# To the bit the compiled step equals what eager mode does on CUDA; the CPU has a kernel of its own.
aten_batch_norm = mock.patch(
    "fastmoco.network.batchnorm.supports", new=mock.Mock(return_value=False)
)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a machine without GPU")


@needs_no_gpu
def test_r50_step_on_eight_gpus_is_one_graph_with_the_expected_collectives() -> None:
    found = traced("resnet50", "whole")
    assert (found["graphs"], found["breaks"]) == (1, 0)
    waits = found["collectives"].pop("_c10d_functional.wait_tensor")
    assert found["collectives"] == {
        "_c10d_functional.all_to_all_single": 1,  # uint8 key images
        "_c10d_functional.all_gather_into_tensor": 1,  # keys
        "_c10d_functional.all_reduce_coalesced": 4,  # 112 MB of gradients in buckets of 25 MB
    }
    assert waits >= 163  # the two above and one per gradient
    # Of 32 images large enough: the stem, and in the first stage what is 256 channels wide.
    layers = {"batch_norm_statistics": 10, "batch_norm_apply": 10, "batch_norm_backward": 5}
    layers |= {"max_pool": 2, "max_pool_backward": 1}
    names = ("any_not_finite", "info_nce_enqueue", "mean_with_gradient", "sgd_ema_")
    once = dict.fromkeys(names, 1)
    assert Counter(found["fused"]) == layers | once
    assert found["weight_casts"] == []  # one launch each; they are cast together
    assert len(found["image_copies"]) <= 1  # the gradient that average pooling spreads out
    assert found["convolutions"] == 3 * 53  # two forwards and one backward
    assert found["other_layouts"] == []
    assert found["host_syncs"] == []


@needs_no_gpu
def test_nothing_that_inductor_writes_for_the_step_adds_with_atomics() -> None:
    """Their order changes from run to run, and with it the bits."""
    found = traced("resnet18", "code")
    assert found["kernels"] > 10
    assert found["atomics"] == 0
    assert found["fused"].count("max_pool") == 2
    assert found["fused"].count("max_pool_backward") == 1


@needs_no_gpu
@pytest.mark.parametrize("mechanism", ["queue", "end_to_end", "memory_bank"])
def test_eager_step_on_cuda_never_waits_for_the_device(mechanism: str) -> None:
    found = traced("resnet18", "eager", mechanism)
    assert found["operations"] > 500
    assert found["host_syncs"] == []
    assert found["other_layouts"] == []


def test_the_watch_sees_what_it_is_to_see() -> None:
    x = torch.arange(4.0)
    for synchronize in (
        lambda: x.sum().item(),
        lambda: torch.nonzero(x),
        lambda: x[x > 1],
        lambda: bool(x.any()),
        lambda: torch.equal(x, x),
        lambda: x.masked_select(x > 2),
        lambda: x.unique(),
    ):
        with Watch() as watch:
            synchronize()
        assert watch.host_syncs, synchronize
    with FakeTensorMode(), Watch() as watch:
        there = torch.empty(3, device="cuda")
        assert not watch.host_syncs
        there.cpu()
        torch.empty(3).copy_(there)
        assert len(watch.host_syncs) == 2
    with cuda_without_device(), FakeTensorMode(), Watch() as watch:
        torch.tensor([1.0, 2.0], device="cuda")
        here, there = torch.empty(3), torch.empty(3, device="cuda")
        here.to("cuda", non_blocking=True)  # from pageable memory
        here.pin_memory().to("cuda")  # the host waits until it has arrived
        there.copy_(here, non_blocking=True)
        assert len(watch.host_syncs) == 4
        here.pin_memory().to("cuda", non_blocking=True)
        there.copy_(here.pin_memory(), non_blocking=True)
        assert len(watch.host_syncs) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cpu_step_reads_nothing_back_between_flushes(accumulate: int) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, accumulate=accumulate))
    step = build_step(config, build_tiny(config, 4), ONE, compile_encoders=False)
    views, rows = images(0), BATCH // accumulate
    parts = [
        Batch(views.im_q[i : i + rows], views.im_k[i : i + rows]) for i in range(0, BATCH, rows)
    ]
    # Compiled and checked once per process, when the choices are printed.
    for module in (batch_norm_cpu, convolution_cpu, convolution_fp32_cpu):
        module.reason()
    with Watch() as watch:
        step(parts, 0)
    assert watch.host_syncs == []
    assert sum(watch.counts.values()) > 50


def steps_of(world: World, config: Config, backend: str | None) -> tuple[list[Any], int, int]:
    """Losses, features, state after some steps at changing rates, graphs and graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    local = BATCH // world.size
    moco = build_tiny(config, local)  # one group per rank: plain BN
    step: Step = build_step(config, moco, world, compile_encoders=backend is not None)
    if backend is not None:
        assert isinstance(step, WholeStep)
        step = replace(step, backend=backend)
    losses, mine = [], slice(world.rank * local, (world.rank + 1) * local)
    for number in range(4):
        set_lr(step.optimizer, LR / (1 + number))
        views = images(number)
        result = step([Batch(views.im_q[mine], views.im_k[mine])], number)
        losses += [result.loss, result.q, result.k]
    state = [t.clone() for t in moco.state_dict().values()]
    return [*losses, *state], counters["stats"]["unique_graphs"], len(counters["graph_break"])


@aten_batch_norm
def eager_and_whole(world: World, precision: Any) -> tuple[bool, int, int]:
    config = replace(COMPILED, moco=replace(COMPILED.moco, bn_group_size=0))
    config = replace(config, run=replace(config.run, precision=precision))
    eager, _, _ = steps_of(world, config, None)
    whole, graphs, breaks = steps_of(world, config, "aot_eager")
    return all(torch.equal(a, b) for a, b in zip(eager, whole, strict=True)), graphs, breaks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_step_with_collectives_equals_ddp_bit_for_bit(
    two_ranks: Ranks, precision: str
) -> None:
    assert two_ranks.run(eager_and_whole, precision) == [(True, 1, 0)] * 2


@aten_batch_norm
def key_path(world: World) -> bool:
    """Whether exchange, encode and gather are one graph that gives what eager gives."""
    torch._dynamo.reset()
    local = BATCH // world.size
    step = build_step(CONFIG, build_tiny(CONFIG, local), world, compile_encoders=False)
    shuffle = build_shuffle("all_to_all", world=world, local=local, seed=1)

    def keys(im_k: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return shuffle(step.embed_k, shuffle.send(im_k, order), order)

    compiled = torch.compile(keys, fullgraph=True, backend="aot_eager")
    equal = []
    with torch.no_grad():
        for number in range(3):
            im_k = images(number).im_k[world.rank * local : (world.rank + 1) * local]
            pairs = zip(
                keys(im_k, shuffle.indices(number)),
                compiled(im_k, shuffle.indices(number)),
                strict=True,
            )
            equal += [torch.equal(a, b) for a, b in pairs]
    return all(equal) and counters["stats"]["unique_graphs"] >= 1


def test_key_path_is_one_graph_and_equals_eager(two_ranks: Ranks) -> None:
    assert two_ranks.run(key_path) == [True, True]


def test_compiled_for_the_cpu_the_step_is_one_graph_that_never_recompiles() -> None:
    eager, _, _ = steps_of(ONE, COMPILED, None)
    whole, graphs, breaks = steps_of(ONE, COMPILED, "inductor")
    assert (graphs, breaks) == (1, 0)
    for mine, truth in zip(whole, eager, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_what_one_graph_cannot_do_keeps_ddp_and_compiled_encoders() -> None:
    for change in (
        replace(COMPILED, optim=replace(COMPILED.optim, accumulate=2)),
        replace(COMPILED, moco=replace(COMPILED.moco, symmetric=True)),
        replace(COMPILED, optim=replace(COMPILED.optim, name="sgd")),
        replace(COMPILED, run=replace(COMPILED.run, precision="fp16")),
    ):
        step = build_step(change, build_tiny(change, 4), ONE, compile_encoders=True)
        assert type(step) is Step
    step = build_step(COMPILED, build_tiny(COMPILED, 4), ONE, compile_encoders=True)
    assert isinstance(step, WholeStep)
