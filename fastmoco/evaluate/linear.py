"""Linear classification on a frozen encoder, by the published protocol or on stored features.

`torchrun -m fastmoco.evaluate.linear --checkpoint FILE --data.root DIR` trains one linear layer for
100 epochs on random crops. With `--cached` features of fixed crops are computed once and 30 pairs
of learning rate and weight decay are trained at once, on one process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmoco.config import Config, ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.evaluate.frozen import FrozenTrunk, stored_features
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.labelled_part import choose_labels, hold_out
from fastmoco.evaluate.linear_cached import Schedule, sweep
from fastmoco.evaluate.linear_protocol import Protocol, TrunkChangedError
from fastmoco.machine import collectives, ranks
from fastmoco.machine.cache import cache_folder


def parser() -> CommandParser:
    """The options."""
    options = CommandParser(prog="fastmoco linear", description=__doc__)
    add = options.add_argument
    add("--checkpoint", required=True, type=Path, help="any file or folder of weights")
    add("--data.root", required=True, type=Path, dest="root", help="folder with train and test/val")
    add("--out", type=Path, help="folder of results; default: linear beside the checkpoint")
    add("--cached", action="store_true", help="sweep on stored features of fixed crops")
    add("--crops", type=int, default=0, help="cached: fixed random crops per image; 0: the centre")
    add("--labels", default="all", help="all, a share such as 1%%, or 5-per-class")
    add("--lr", type=float, help="full protocol: learning rate; default 30")
    add("--epochs", type=int, default=100)
    add("--milestones", type=int, nargs="*", help="epochs that divide lr by 10; default 60%%, 80%%")
    add("--batch_size", type=int, default=256, help="over all ranks")
    add("--image_size", type=int, default=224)
    add("--resize", type=int, default=0, help="shorter edge before the centre crop; 0: 8/7 of size")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="reader processes of the full protocol; 0 chooses")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return options


def schedule_of(given: argparse.Namespace) -> Schedule:
    """Raises `ConfigError` for numbers that cannot train."""
    for name, low in (("epochs", 1), ("batch_size", 1), ("image_size", 8), ("crops", 0)):
        if getattr(given, name) < low:
            raise ConfigError(f"--{name} is {getattr(given, name)}, but must be at least {low}.")
    if given.cached and given.lr is not None:
        raise ConfigError("--cached trains many learning rates at once: leave out --lr.")
    if given.crops and not given.cached:
        raise ConfigError("--crops is for --cached; the full protocol draws new crops each epoch.")
    if given.lr is not None and not 0 < given.lr < float("inf"):
        raise ConfigError(f"--lr is {given.lr}, but must be greater than 0.")
    scaled = (given.epochs * 6 // 10, given.epochs * 8 // 10)
    steps = scaled if given.milestones is None else tuple(given.milestones)
    return Schedule(given.epochs, given.batch_size, steps, seed=given.seed)


def both_folders(
    given: argparse.Namespace, rule: PixelRule
) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images in the evaluation view. Raises `ConfigError`."""
    names = [n for n in ("test", "val") if (given.root / n).is_dir()]
    if not (given.root / "train").is_dir() or not names:
        raise ConfigError(f"{given.root} needs a folder train, and test or val, of class folders.")
    resize = given.resize or given.image_size * 8 // 7
    if resize < given.image_size:
        raise ConfigError(f"--resize {resize} is smaller than --image_size {given.image_size}.")
    train, test = (
        LabelledImages(
            given.root / name, resize=resize, image_size=given.image_size, rule=rule, strict=True
        )
        for name in ("train", names[0])
    )
    if train.class_names != test.class_names:
        raise ConfigError(f"train and {names[0]} of {given.root} do not hold the same classes.")
    kept = choose_labels(train.labels, given.labels, given.seed)
    train.keep(kept.tolist())
    return train, test


def cached(given: argparse.Namespace, trunk: FrozenTrunk, world: ranks.World) -> dict[str, object]:
    """Sweep; prints the table. Raises `ConfigError`."""
    if world.size > 1:
        raise ConfigError("--cached runs on one process: start it without torchrun.")
    schedule, show = schedule_of(given), sys.stderr.isatty()
    train, test = both_folders(given, PixelRule.of(trunk.weights.pixels))
    store = cache_folder() / "features"
    options = {"device": world.device, "seed": given.seed, "progress": show}
    crops = stored_features(trunk, train, store, crops=given.crops, **options)
    centre = crops if not given.crops else stored_features(trunk, train, store, **options)
    tested = stored_features(trunk, test, store, **options)
    learn, choose = hold_out(train.labels, 0.1, given.seed)
    device = world.device
    found = sweep(
        (crops[:, learn].to(device), train.labels[learn].to(device)),
        (centre[0, choose].to(device), train.labels[choose].to(device)),
        (tested[0].to(device), test.labels.to(device)),
        classes=len(train.class_names),
        schedule=schedule,
        progress=show,
    )
    print(found.table(), flush=True)
    lr, decay = found.settings[found.best]
    return {
        "kind": "linear_cached",
        "lr": lr,
        "weight_decay": decay,
        "held_out_top1": found.held_out[found.best],
        "val_top1": found.test[found.best],
        "images": len(train),
    }


def full(given: argparse.Namespace, trunk: FrozenTrunk, world: ranks.World) -> dict[str, object]:
    """The published protocol. Raises `ConfigError`."""
    schedule = schedule_of(given)
    train, test = both_folders(given, PixelRule.of(trunk.weights.pixels))
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
    return protocol.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for input that cannot be evaluated."""
    first = os.environ.get("RANK", "0") == "0"
    given = parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        try:
            world = ranks.start(given.device, Config().run.timeout_s)
        except ValueError as error:
            raise ConfigError(str(error).replace("run.device", "--device")) from error
        trunk = FrozenTrunk(given.checkpoint, world.device)
        if given.out is None:
            given.out = trunk.weights.path.parent / "linear"
        if world.is_main:
            print(trunk.weights.describe(), flush=True)
        with collectives.naming_failures(world, lambda: 0):
            result = (cached if given.cached else full)(given, trunk, world)
        if world.is_main:
            given.out.mkdir(parents=True, exist_ok=True)
            with (given.out / "results.jsonl").open("a") as file:
                file.write(json.dumps({**result, "seed": given.seed}) + "\n")
            print(f"linear top-1 {100 * float(str(result['val_top1'])):.2f} %, in {given.out}")
    except (ConfigError, OSError, collectives.CollectiveError, TrunkChangedError) as error:
        if first or isinstance(error, collectives.CollectiveError):
            print(f"fastmoco: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
