"""What an encoder has learned, beside what it started from: rows of one table.

    python -m fastmoco.experiments.linear_table --checkpoint FILE --data.root DIR --out ROWS.jsonl

kNN, cached linear and the full protocol, of raw pixels, of the same network untrained and of the
checkpoint. Of each the sweep of `--cached` chooses the learning rate, on held-out training images,
that the full protocol then has. It takes as many crops as epochs, so both learn from the same ones.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser
from fastmoco.evaluate.features import pixel_features
from fastmoco.evaluate.knn import TEMPERATURE, knn_accuracy
from fastmoco.evaluate.labelled_part import both_folders, check_numbers, labelled_parser
from fastmoco.evaluate.linear import __main__ as linear
from fastmoco.evaluate.linear.frozen import CheckedTrunk, stored_features
from fastmoco.evaluate.options import View, command
from fastmoco.experiments.runs import environment
from fastmoco.machine.cache import cache_folder
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code
from fastmoco.run.record import METRICS

ENCODERS = ("raw pixels", "untrained", "trained")


class RawPixels(CheckedTrunk):
    """In place of a trunk: its pictures are their own features, in the view of the checkpoint."""

    def __call__(self, images: Tensor) -> Tensor:
        return pixel_features(images)

    @property
    def features(self) -> int:
        """Of `pixel_features`, whatever the size of the picture."""
        return pixel_features(torch.zeros(1, 32, 32, self.weights.pixels.channels)).shape[1]

    def fingerprint(self) -> str:
        """No weights, so nothing can change."""
        return "raw pixels"


def trunk_of(encoder: str, checkpoint: Path, seed: int, device: torch.device) -> CheckedTrunk:
    """One of `ENCODERS`; `seed` initializes the untrained one."""
    if encoder == "raw pixels":
        return RawPixels(checkpoint, device)
    trunk = CheckedTrunk(checkpoint, device)
    if encoder == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = trunk.weights.architecture.encoder()
        fresh.add_module("fc", torch.nn.Identity())
        trunk.encoder = fresh.requires_grad_(False).to(device).eval()
    return trunk


def knn(given: argparse.Namespace, trunk: CheckedTrunk, world: World) -> dict[str, object]:
    """Top-1 of the good images, with the features that the sweep has stored."""
    images = both_folders(given, View.of(given, trunk.weights))
    store, found = cache_folder() / "features", []
    for part in images:
        features = stored_features(trunk, part, store, device=world.device)
        good = linear.good_rows(part, features)
        found += [normalize(features[0, good].to(world.device), dim=1), part.labels[good]]
    bank, bank_labels, tested, labels = found
    top1 = knn_accuracy(
        bank,
        bank_labels,
        tested,
        labels,
        k=given.k,
        temperature=TEMPERATURE,
        num_classes=len(images[0].class_names),
    )
    return {"k": given.k, "val_top1": top1, "images": len(bank), "test_images": len(tested)}


def measured(
    given: argparse.Namespace, encoder: str, trunk: CheckedTrunk, world: World
) -> Iterator[dict[str, object]]:
    """The three rows of an encoder. Results of the full protocol lie beside the file of rows."""
    common = {**vars(given), "milestones": None}
    beside = given.out.with_suffix("") / f"{encoder} {given.seed}".replace(" ", "-")
    sweep = {"cached": True, "crops": given.epochs, "lr": None, "workers": 0}
    cached = linear.cached(argparse.Namespace(**common | sweep), trunk, world)
    yield cached
    yield {"kind": "knn", **knn(given, trunk, world)}
    protocol = {"cached": False, "crops": 0, "lr": cached["lr_without_decay"], "out": beside}
    best = linear.full(argparse.Namespace(**common | protocol), trunk, world)
    last = json.loads((beside / METRICS).read_text().splitlines()[-1])
    shares = {"val_top1": last["val_top1"], "val_top5": last["val_top5"]}
    yield {**best, **shares, "best_top1": best["val_top1"]}


def parser() -> CommandParser:
    """Those of `fastmoco linear` that both its ways have, and the table's own."""
    options = labelled_parser("linear_table", __doc__ or "")
    add = options.add_argument
    add("--epochs", type=int, default=20, help="and crops of the cached sweep")
    add("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="all by default")
    add("--k", type=int, default=200, help="neighbours that vote")
    return options


def _table(given: argparse.Namespace, world: World) -> None:
    check_numbers(given, k=1)
    if given.out is None or given.out.suffix != ".jsonl":
        raise ConfigError(f"--out {given.out or ''} must name the file of rows, ROWS.jsonl.")
    for encoder in given.encoders:
        trunk = trunk_of(encoder, given.checkpoint, given.seed, world.device)
        about = {"encoder": encoder, "seed": given.seed}
        if encoder != "raw pixels":
            about["network"] = str(trunk.weights.architecture)
        if encoder == "trained":
            about["pretraining_epochs"] = trunk.weights.epoch
        for row in measured(given, encoder, trunk, world):
            told = {"command": given.command, **about, **row, "epochs": given.epochs}
            with given.out.open("a") as file:
                file.write(json.dumps(told | environment()) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for input that cannot be evaluated."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser()
    program = ["python", "-m", "fastmoco.experiments.linear_table"]
    options.set_defaults(command=shlex.join([*program, *words]))
    return command(options, words, _table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
