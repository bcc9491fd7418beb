"""Linear classification on a frozen encoder, by the published protocol or on stored features.

`torchrun -m fastmoco.evaluate.linear --checkpoint FILE --data.root DIR` trains one linear layer for
100 epochs on random crops. With `--cached` features of fixed crops are computed once and 30 pairs
of learning rate and weight decay are trained at once, on one process, on nine tenths of the images.
The pair that classifies the last tenth best then learns again from all images: that is the result.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.labelled_part import (
    both_folders,
    check_numbers,
    hold_out,
    labelled_parser,
)
from fastmoco.evaluate.labelled_training import keep_result
from fastmoco.evaluate.linear.cached import Schedule, sweep, train_sweep
from fastmoco.evaluate.linear.frozen import CheckedTrunk, stored_features
from fastmoco.evaluate.linear.protocol import Protocol, TrunkChangedError
from fastmoco.evaluate.options import View, command
from fastmoco.machine import ranks
from fastmoco.machine.cache import cache_folder
from fastmoco.machine.stopping import exit_code


def parser() -> CommandParser:
    """The options."""
    options = labelled_parser("fastmoco linear", __doc__ or "")
    add = options.add_argument
    add("--cached", action="store_true", help="sweep on stored features of fixed crops")
    add("--crops", type=int, default=0, help="cached: fixed random crops per image; 0: the centre")
    add("--lr", type=float, help="full protocol: learning rate; default 30")
    add("--epochs", type=int, default=100)
    add("--milestones", type=int, nargs="*", help="epochs that divide lr by 10; default 60%%, 80%%")
    return options


def schedule_of(given: argparse.Namespace) -> Schedule:
    """Raises `ConfigError` for numbers that cannot train."""
    check_numbers(given, crops=0)
    if given.cached and given.lr is not None:
        raise ConfigError("--cached trains many learning rates at once: leave out --lr.")
    if given.cached and given.workers:
        raise ConfigError("--workers is for the full protocol: leave it out with --cached.")
    if given.crops and not given.cached:
        raise ConfigError("--crops is for --cached; the full protocol draws new crops each epoch.")
    if given.lr is not None and not 0 < given.lr < float("inf"):
        raise ConfigError(f"--lr is {given.lr}, but must be greater than 0.")
    scaled = (given.epochs * 6 // 10, given.epochs * 8 // 10)
    steps = scaled if given.milestones is None else tuple(given.milestones)
    return Schedule(given.epochs, given.batch_size, steps, seed=given.seed)


def cached(given: argparse.Namespace, trunk: CheckedTrunk, world: ranks.World) -> dict[str, object]:
    """Sweep, and learn again from all images; prints the table. Raises `ConfigError`."""
    if world.size > 1:
        raise ConfigError("--cached runs on one process: start it without torchrun.")
    schedule, show = schedule_of(given), sys.stderr.isatty()
    train, test = both_folders(given, View.of(given, trunk.weights))
    store = cache_folder() / "features"
    options = {"device": world.device, "seed": given.seed, "progress": show}
    crops = stored_features(trunk, train, store, crops=given.crops, **options)
    centre = crops if not given.crops else stored_features(trunk, train, store, **options)
    tested = stored_features(trunk, test, store, **options)
    known, good = good_rows(train, crops, centre), good_rows(test, tested)
    learn, choose = (known[part] for part in hold_out(train.labels[known], 0.1, given.seed))
    device, classes = world.device, len(train.class_names)
    measured = tested[0, good].to(device), test.labels[good].to(device)
    found = sweep(
        (crops[:, learn].to(device), train.labels[learn].to(device)),
        (centre[0, choose].to(device), train.labels[choose].to(device)),
        measured,
        classes=classes,
        schedule=schedule,
        progress=show,
    )
    print(found.table(), flush=True)
    # One or two; without weight decay it is what the full protocol would learn at this rate.
    both = (found.best, found.best_without_decay)
    settings = list(dict.fromkeys(found.settings[s] for s in both))
    again = train_sweep(
        crops[:, known].to(device),
        train.labels[known].to(device),
        classes=classes,
        lr=[lr for lr, _ in settings],
        weight_decay=[decay for _, decay in settings],
        schedule=schedule,
        progress=show,
    )
    top1, top5 = (shares.tolist() for shares in again.accuracies(*measured))
    for (lr, decay), one, five in zip(settings, top1, top5, strict=True):
        print(
            f"lr {lr:g}, weight decay {decay:g}, learned again from all {len(known)} images: "
            f"test {100 * one:.2f} %, top-5 {100 * five:.2f} %"
        )
    return {
        "kind": "linear_cached",
        "lr": settings[0][0],
        "weight_decay": settings[0][1],
        "held_out_top1": found.held_out[found.best],
        "val_top1": top1[0],
        "val_top5": top5[0],
        "lr_without_decay": settings[-1][0],
        "val_top1_without_decay": top1[-1],
        "images": len(known),
        "test_images": len(good),
    }


def good_rows(images: LabelledImages, *stored: Tensor) -> Tensor:
    """Indices of the images whose features of (V, n, D) are not NaN; a warning names the others.

    Raises `ConfigError` where none is left.
    """
    bad = torch.stack([features[:, :, 0].isnan().any(dim=0) for features in stored]).any(dim=0)
    images.exclude(bad.nonzero().flatten().tolist())
    sentence = images.bad_sentence("images")
    if bad.all():
        raise ConfigError(f"No image can be used: {sentence}")
    if sentence:
        print(f"WARNING: {sentence}", file=sys.stderr, flush=True)
    return (~bad).nonzero().flatten()


def full(given: argparse.Namespace, trunk: CheckedTrunk, world: ranks.World) -> dict[str, object]:
    """The published protocol. Raises `ConfigError`."""
    schedule = schedule_of(given)
    train, test = both_folders(given, View.of(given, trunk.weights))
    protocol = Protocol(
        trunk,
        train,
        test,
        schedule,
        lr=30.0 if given.lr is None else given.lr,
        out=given.out,
        world=world,
        workers=given.workers,
    )
    return protocol.run() | {"lr": protocol.lr, "weight_decay": 0.0}


def _classify(given: argparse.Namespace, world: ranks.World) -> None:
    trunk = CheckedTrunk(given.checkpoint, world.device)
    if given.out is None:
        given.out = trunk.weights.path.parent / "linear"
    if world.is_main:
        print(trunk.weights.describe(), flush=True)
    result = (cached if given.cached else full)(given, trunk, world)
    if world.is_main:
        keep_result(given.out, {**result, "seed": given.seed})
        print(f"linear top-1 {100 * float(str(result['val_top1'])):.2f} %, in {given.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for input that cannot be evaluated, 1 for a lost trunk."""
    try:
        return command(parser(), arguments, _classify)
    except TrunkChangedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastmoco: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(exit_code(main))
