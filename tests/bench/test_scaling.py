"""Bytes on the wire: counted on real gloo ranks, and equal to what `bench.scaling` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.scaling import LINKS, OURS, RANKS, Size, model, seconds
from bench.steps.published import gather, shuffle_batch, unshuffle_batch
from fastmoco.config import ShuffleBN
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.optim.update import set_lr
from fastmoco.method.shuffle_bn import build_shuffle
from tests.support.ranks import Ranks
from tests.support.tiny import BATCH, CONFIG, LR, build_tiny, images
from tests.support.wire import Wire

Counts = dict[str, dict[str, int]]


def count(strategy: ShuffleBN, size: Size, world: World) -> dict[str, int]:
    """Bytes that this rank receives in the key path, by purpose, from the calls made."""
    shuffle = build_shuffle(strategy, world=world, local=size.local, seed=0)
    order = shuffle.indices(0).clone()
    pixels = torch.zeros(size.local, size.side, size.side, 3, dtype=torch.uint8)

    def encode(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), size.dim, dtype=torch.float32)

    with Wire() as wire:
        keys = shuffle(encode, shuffle.send(pixels, order), order)
        assert keys.gathered.shape == (size.local * world.size, size.dim)
    return {"images": wire.received["all_to_all"], "keys": wire.received["all_gather"]}


@contextmanager
def imagined(ranks: int) -> Iterator[World]:
    """Rank 0 of a process group whose other ranks do not exist; collectives bring nothing."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        backend = "fake" if ranks > 1 else "none"
        yield World(0, 0, ranks, torch.device("cpu"), backend)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def counts(world: World, size: Size) -> Counts:
    return {strategy: count(strategy, size, world) for strategy in OURS}


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize("local", [2, 6, 8])
def test_key_path_brings_what_the_model_says(
    pool: str, local: int, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue(pool)
    size = Size(local=local, side=5, dim=7)
    batch = local * size.pixels  # bytes of the local uint8 batch
    for found in ranks.run(counts, size):
        for strategy in OURS:
            expected = model(strategy, size, ranks.size)
            assert found[strategy] == {name: expected[name] for name in ("images", "keys")}
        assert found["loader"]["images"] == found["split"]["images"] == 0
        moved = found["all_to_all"]["images"]
        if local % ranks.size == 0:
            assert moved == batch * (ranks.size - 1) // ranks.size
        # Where W does not divide N, the whole rows that a rank keeps are fewer than N / W.
        assert moved <= batch - (local // ranks.size) * size.pixels


@pytest.mark.parametrize("ranks", RANKS)
def test_key_path_of_many_ranks_brings_what_the_model_says(ranks: int) -> None:
    for strategy in OURS:
        expected = model(strategy, Size(), ranks)
        with imagined(ranks) as world, FakeTensorMode(allow_non_fake_inputs=True):
            found = count(strategy, Size(), world)
        assert found == {name: expected[name] for name in ("images", "keys")}


def whole_step(world: World) -> dict[str, int]:
    """Bytes of every collective of one training step."""
    config = replace(CONFIG, moco=replace(CONFIG.moco, shuffle_bn="all_to_all"))
    step = build_step(config, build_tiny(config, 4), world, compile_encoders=False)
    set_lr(step.optimizer, LR)
    local = BATCH // world.size
    rows = slice(world.rank * local, (world.rank + 1) * local)
    views = images(0)
    with Wire() as wire:
        step([Batch(views.im_q[rows], views.im_k[rows])], 0)
    return dict(wire.received)


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_a_whole_step_sends_images_keys_and_gradients_and_nothing_else(
    pool: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue(pool)
    parameters = sum(p.numel() for p in build_tiny(CONFIG, 4).encoder_q.parameters())
    size = Size(local=BATCH // ranks.size, side=12, dim=8, parameters=parameters)
    expected = model("all_to_all", size, ranks.size)
    for received in ranks.run(whole_step):
        assert received == {
            "all_to_all": expected["images"],
            "all_gather": expected["keys"],
            "all_reduce": expected["gradients"],
        }


class Buffered(nn.Module):
    """A layer beside a queue, as the published trainer wraps them in DDP together."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("queue", torch.zeros(size.queue, size.dim))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def published(world: World, size: Size) -> dict[str, int]:
    module = DistributedDataParallel(Buffered(size))
    with torch.no_grad(), Wire() as wire:
        module(torch.zeros(1, 2))
        fp32 = torch.zeros(size.local, 3, size.side, size.side)
        _, home = shuffle_batch(fp32)
        keys = torch.zeros(size.local, size.dim)
        gather(unshuffle_batch(keys, home))
    return dict(wire.received)


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_published_scheme_costs_what_the_model_says(
    pool: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue(pool)
    size = Size(local=4, side=5, dim=7, queue=12, statistics=0, norms=0)
    expected = model("official", size, ranks.size)
    for received in ranks.run(published, size)[1:]:  # the source of a broadcast receives nothing
        assert received == {
            "all_gather": expected["images"] + expected["keys"],
            "broadcast": expected["state"],
        }


def test_recipe_size_is_that_of_the_model() -> None:
    from fastmoco.config import ModelConfig
    from fastmoco.network.encoder import build_encoder

    encoder, size = build_encoder(ModelConfig(), 32), Size()
    statistics = [b.numel() for n, b in encoder.named_buffers() if "running" in n]
    assert sum(p.numel() for p in encoder.parameters()) == size.parameters
    assert sum(statistics) == size.statistics
    assert len(statistics) == 2 * size.norms


def test_time_is_messages_times_alpha_plus_bytes_over_beta() -> None:
    received = {"images": 40_000_000_000, "keys": 0, "state": 0, "gradients": 0}
    link = replace(LINKS["infiniband"], alpha=0.0)
    assert seconds(received, "loader", 4, link) == pytest.approx(1.0)
    slow = replace(link, alpha=1.0)
    # 2 log2 4 for the gradients and 3 for the keys; the exchange adds 3.
    assert seconds(received, "loader", 4, slow) == pytest.approx(1.0 + 4 + 3)
    assert seconds(received, "all_to_all", 4, slow) == pytest.approx(1.0 + 4 + 3 + 3)
