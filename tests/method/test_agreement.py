"""Ranks that drift apart stop the run; ranks that are lost are named with step and operation."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastmoco.machine.collectives import (
    CollectiveError,
    all_gather,
    all_to_all,
    average_gradients,
    naming_failures,
)
from fastmoco.machine.ranks import World, agree_on_start
from fastmoco.method.agreement import (
    DisagreementError,
    agree_on_kernels,
    describe,
    fingerprint,
    require_agreement,
    sentences_of_all,
)
from fastmoco_kernels import launch
from tests.support.ranks import Ranks, forking_context
from tests.support.tiny import CONFIG, ONE, build_tiny


def test_fingerprint_depends_on_every_bit_and_position() -> None:
    x = torch.randn(3, 5, 4)
    base = int(fingerprint(x))
    assert int(fingerprint(x.clone())) == base
    bits = x.view(torch.int32).view(-1)
    seen = {base}
    for place in range(len(bits)):
        for bit in (0, 12, 23, 31):
            changed = bits.clone()
            changed[place] ^= torch.tensor(-(1 << 31) if bit == 31 else 1 << bit).int()
            seen.add(int(fingerprint(changed.view(torch.float32))))
    assert len(seen) == 1 + 4 * len(bits)
    swapped = bits.clone()
    swapped[[0, 7]] = bits[[7, 0]]
    assert int(fingerprint(swapped.view(torch.float32))) != base
    assert int(fingerprint(torch.tensor([5]))) != int(fingerprint(torch.tensor([5 << 32])))
    assert int(fingerprint(torch.tensor([0.0]))) != int(fingerprint(torch.tensor([-0.0])))


def test_fingerprint_of_several_chunks_knows_their_order() -> None:
    x = torch.arange(3 << 20, dtype=torch.int64)  # six chunks of int32 words
    swapped = torch.cat([x[1 << 20 :], x[: 1 << 20]])
    assert int(fingerprint(x)) != int(fingerprint(swapped))


def test_fingerprint_is_of_values_not_of_memory_format() -> None:
    x = torch.randn(4, 3, 5, 5)
    there = x.to(memory_format=torch.channels_last)
    assert int(fingerprint(x)) == int(fingerprint(there))


def agree(world: World, broken: dict[int, str]) -> str:
    """The sentence that this rank stops with, or nothing."""
    moco = build_tiny(CONFIG, 4)
    with torch.no_grad():
        # Statistics of a rank's own batches, which must not count.
        for buffer in moco.running_statistics():
            buffer += world.rank
        name = broken.get(world.rank)
        if name == "queue_ptr":
            moco.queue_ptr += 1
        elif name:
            tensor = moco.queue if name == "queue" else moco.get_parameter(name)
            last = (-1,) * tensor.dim()
            tensor[last] = torch.nextafter(tensor[last], torch.tensor(10.0))
    try:
        require_agreement(moco, world, 40)
    except DisagreementError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["queue", "queue_ptr", "encoder_k.0.weight", "encoder_k.8.bias"])
def test_one_flipped_bit_stops_every_rank_and_names_the_culprit(
    four_ranks: Ranks, name: str
) -> None:
    sentences = four_ranks.run(agree, {2: name})
    assert len(set(sentences)) == 1
    assert sentences[0].startswith("After step 40 rank 2 of 4 holds another state")
    assert f"in {name}:" in sentences[0]


def test_equal_ranks_go_on_and_encoder_q_is_not_compared(four_ranks: Ranks) -> None:
    assert four_ranks.run(agree, {}) == [""] * 4
    assert four_ranks.run(agree, {1: "encoder_q.0.weight"}) == [""] * 4


def kernels(world: World, wrong: dict[int, dict[str, str]]) -> tuple[list[str], dict[str, str]]:
    """Sentences, and ops that run by reference, where the preflight finds `wrong` on each rank."""
    with (
        mock.patch("fastmoco.method.agreement.wrong_ops", return_value=wrong.get(world.rank, {})),
        mock.patch.dict(launch._replaced, clear=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        return agree_on_kernels(world), launch.replaced()


def test_a_kernel_wrong_on_one_rank_runs_by_its_reference_on_all(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(kernels, {1: {"ema_": "float32: WRONG by 2"}})
    assert first == second
    sentences, replaced = first
    assert list(replaced) == ["ema_"]
    assert sentences == [
        "ema_ is wrong on rank 1 of 2 (float32: WRONG by 2): its eager reference runs on every "
        "rank, right but slower."
    ]


def test_ranks_with_different_wrong_kernels_replace_all_of_them(two_ranks: Ranks) -> None:
    wrong = {0: {"sgd_ema_": "a", "ema_": "b"}, 1: {"ema_": "c", "info_nce": "d"}}
    for sentences, replaced in two_ranks.run(kernels, wrong):
        assert replaced == {"info_nce": "d", "ema_": "b", "sgd_ema_": "a"}
        assert [s.split(" is wrong on ")[0] for s in sentences] == list(replaced)
        assert "ranks 0, 1 of 2 (b)" in sentences[1]


def test_right_kernels_stay(two_ranks: Ranks) -> None:
    assert two_ranks.run(kernels, {}) == [([], {})] * 2


def said(world: World, by_rank: dict[int, list[str]]) -> list[str]:
    return sentences_of_all(by_rank[world.rank], world)


def test_a_warning_of_any_rank_reaches_all_and_names_its_rank(two_ranks: Ranks) -> None:
    answers = two_ranks.run(said, {0: ["Both."], 1: ["Mine.", "Both."]})
    assert answers == [["Both.", "rank 1: Mine."]] * 2
    assert sentences_of_all(["Alone."], ONE) == ["Alone."]


def test_without_a_majority_all_differing_ranks_are_named(two_ranks: Ranks) -> None:
    (sentence, _) = two_ranks.run(agree, {0: "queue"})
    assert "ranks 0, 1 of 2 hold another state" in sentence


def test_a_long_list_of_tensors_is_cut_short() -> None:
    table = [[0] * 9, [0] * 9, [1] * 9]
    sentence = describe([f"t{i}" for i in range(9)], table, 7)
    assert "rank 2 of 3" in sentence
    assert "t0, t1, t2, t3 and 5 more" in sentence


def lonely(rank: int, store: str, operation: str, answers: Any) -> None:
    """Rank 0 begins an operation that rank 1 does not join in time."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, rank, 2, torch.device("cpu"), "gloo")
    model = average_gradients(nn.Linear(4, 2), world)
    # Only now, for a rank may come late to what both take part in.
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    if rank == 1:
        time.sleep(3600)  # it is killed
        return
    try:
        with naming_failures(world, lambda: 41):
            if operation == "all_gather":
                all_gather(torch.ones(2, 3), world)
            elif operation == "all_to_all":
                all_to_all(torch.ones(2, 3), [1, 1], [1, 1], world).sum()
            else:
                model(torch.ones(1, 4)).sum().backward()
    except CollectiveError as error:
        answers.put(str(error))
    except BaseException as error:
        answers.put(f"other: {error!r}")


@pytest.mark.parametrize("operation", ["all_gather", "all_to_all", "average of gradients"])
def test_a_timeout_names_rank_step_and_operation(tmp_path: Path, operation: str) -> None:
    context = forking_context()
    answers = context.Queue()
    ranks = [
        context.Process(target=lonely, args=(rank, str(tmp_path / "store"), operation, answers))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    sentence = answers.get()  # comes while rank 1 sleeps, or never
    for process in ranks:
        process.kill()
        process.join()
    assert sentence.startswith("rank 0 of 2, step 42: ")
    assert operation in sentence


def test_every_start_gets_a_name_of_its_own_in_a_store_with_leftovers() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    names = []
    for _ in range(3):  # the second and third start find the keys of those before
        with ThreadPoolExecutor(3) as pool:
            late = [pool.submit(agree_on_start, store, rank, 3, 600.0) for rank in (2, 0)]
            time.sleep(0.1)
            late.append(pool.submit(agree_on_start, store, 1, 3, 600.0))
            (name,) = {future.result() for future in late}
        names.append(name)
    assert len(set(names)) == 3
    with pytest.raises(TimeoutError, match="rank 1 of 3"):
        agree_on_start(store, 1, 3, 0.2)


def test_other_errors_pass_unchanged() -> None:
    world = World(0, 0, 2, torch.device("cpu"), "gloo")
    with pytest.raises(RuntimeError, match="shape") as caught, naming_failures(world, lambda: 0):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, CollectiveError)
