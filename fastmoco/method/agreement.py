"""Do all ranks still hold the same queue, cursor and key encoder?

Each rank computes them by itself from the same gathered keys and averaged gradients. If one drifts
(memory error, mixed library versions, another configuration on one node), every later step is
wrong and no loss curve shows it. So their bits are compared wherever the host waits anyway.

T tensors compared, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastmoco.config import Config, ConfigError, OneRankError
from fastmoco.data.loader import Loader, build_loader
from fastmoco.data.plan import KeyRows
from fastmoco.data.sources.source import Source
from fastmoco.machine.collectives import CollectiveError, all_gather, any_rank, gather_objects
from fastmoco.machine.precision import DTYPES, Precision
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo
from fastmoco_kernels import launch
from fastmoco_kernels.preflight import wrong_ops

# Bounds the int64 temporaries to 8 MiB, whatever the queue measures.
_CHUNK = 1 << 20
_BETWEEN_CHUNKS = 0x9E3779B97F4A7C15 - (1 << 64)
_NAMED = 4

T = TypeVar("T")


class DisagreementError(RuntimeError):
    """Ranks no longer hold the same state. The message is one sentence for the user."""


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 () that depends on every bit of a contiguous-able tensor and on its position.

    A sum of the bits weighted by position, modulo 2^64: integers, so that no order of summation
    can change it. float32 or int64, any shape; stays on the device.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(torch.int32)
    weights = torch.arange(1, 2 * min(len(bits), _CHUNK), 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * _BETWEEN_CHUNKS + (chunk * weights[: len(chunk)]).sum()
    return total


def compared_tensors(moco: MoCo) -> dict[str, Tensor]:
    """What has to be equal on all ranks, by name. BN statistics belong to a rank."""
    parameters = {f"encoder_k.{name}": p for name, p in moco.encoder_k.named_parameters()}
    dictionary = {n: t for n, t in moco.named_buffers(recurse=False) if t.numel()}
    return {**dictionary, **parameters}


def require_one_precision(precision: Precision, world: World) -> None:
    """Raise `ConfigError`, on every rank, where `run.precision auto` means another type on some."""
    found = [name for name in DTYPES if any_rank(precision.name == name, world)]
    if len(found) > 1:
        raise ConfigError(
            f"run.precision auto means {' on some ranks and '.join(found)} on others, because "
            "their devices differ: set run.precision to a type that all of them can run."
        )


def agree_on_kernels(world: World) -> list[str]:
    """Compare every kernel with its reference on every rank's device, before the first step.

    An op that is wrong on any rank runs by its reference on all of them: ranks that compute the
    same number in two ways soon hold different queues. Returns one sentence for each such op, the
    same on every rank.
    """
    found = gather_objects(wrong_ops(world.device), world)
    sentences = []
    for op in launch.OPS:
        reasons = {rank: wrong[op] for rank, wrong in enumerate(found) if op in wrong}
        if not reasons:
            continue
        first = next(iter(reasons.values()))
        launch.use_reference(op, first)
        sentences.append(
            f"{op} is wrong on rank{'s' * (len(reasons) > 1)} {', '.join(map(str, reasons))} of "
            f"{world.size} ({first}): its eager reference runs on every rank, right but slower."
        )
    return sentences


def sentences_of_all(sentences: list[str], world: World) -> list[str]:
    """What any rank has to say, once each; on every rank. Names ranks where not all say it."""
    found = gather_objects(sentences, world)
    told = []
    for sentence in dict.fromkeys(one for said in found for one in said):
        ranks = [str(rank) for rank, said in enumerate(found) if sentence in said]
        some = f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: "
        told.append(some * (len(ranks) < world.size) + sentence)
    return told


# Faults that one rank alone may have met, so that it says them itself; a lost rank is said by each
# that is left. Of all others one sentence is enough.
ALONE = (OneRankError, OSError, CollectiveError)


def on_every_rank(make: Callable[[], T], world: World) -> T:
    """What `make` returns here; `ConfigError` on every rank where it raised one on any.

    Else the others would wait for a rank that has ended with a sentence.
    """
    made, reason = None, ""
    try:
        made = make()
    except ConfigError as error:
        reason = str(error)
    reasons = gather_objects(reason, world)
    for rank, text in enumerate(reasons):
        if text:
            raise ConfigError(f"Rank {rank}: {text}" if len(set(reasons)) > 1 else text)
    return cast(T, made)


def agreed_loader(
    config: Config, source: Source | None, world: World, key_rows: KeyRows | None
) -> Loader:
    """The loader of this rank, over images that are the same on all of them.

    source: the images that the configuration names, where they are open already.

    Raises `ConfigError`, on every rank, where any finds its images unusable or others than rank 0.
    """

    def build() -> Loader:
        rank, size, device = world.rank, world.size, world.device
        return build_loader(
            config, source, rank=rank, world_size=size, device=device, key_rows=key_rows
        )

    loader = on_every_rank(build, world)
    require_one_data_set(loader, world)
    return loader


def require_one_data_set(loader: Loader, world: World) -> None:
    """Raise `ConfigError`, on every rank, where nodes have unequal copies of the data.

    Fingerprints travel only where their digests differ.
    """
    mine = loader.fingerprint
    digests = gather_objects(mine.digest if mine else "", world)
    if len(set(digests)) == 1:
        return
    first = gather_objects(mine if world.is_main else None, world)[0]
    told = gather_objects(loader.changes_since(first) if first else "", world)
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    raise ConfigError(
        f"Rank{'s' * (len(other) > 1)} {', '.join(map(str, other))} of {world.size} and rank 0 do "
        f"not see the same images: compared with rank 0, rank {other[0]} has "
        f"{told[other[0]] or 'images that cannot be read'}. Give every node the same copy."
    )


def require_agreement(moco: MoCo, world: World, step: int) -> None:
    """Compare the state of all ranks after `step` steps; call it where the host waits anyway.

    One all-gather of T int64 and one copy to the host. Raises `DisagreementError`, on every rank
    with the same sentence, naming the ranks and tensors that differ.
    """
    if world.size == 1:
        return
    tensors = compared_tensors(moco)
    mine = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    table = all_gather(mine[None], world).tolist()  # W lists of T
    if all(row == table[0] for row in table):
        return
    raise DisagreementError(describe(list(tensors), table, step))


def describe(names: list[str], table: list[list[int]], step: int) -> str:
    """One sentence from the fingerprints, table[rank][tensor]; a majority counts as right."""
    differing = []
    ranks: set[int] = set()
    for name, values in zip(names, zip(*table, strict=True), strict=True):
        ((common, count), *others) = Counter(values).most_common()
        if not others:
            continue
        differing.append(name)
        majority = 2 * count > len(values)
        ranks |= {r for r, value in enumerate(values) if not majority or value != common}
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return (
        f"After step {step} rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))} of "
        f"{len(table)} hold{'s' * (len(ranks) == 1)} another state than the rest, in "
        f"{', '.join(differing[:_NAMED])}{more}: no checkpoint was written after it; look for "
        "unequal library versions or a faulty device there, and start again to resume."
    )
