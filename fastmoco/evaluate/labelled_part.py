"""Which labelled images a classifier learns from: two folders, and shares that keep every class."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.config import Config, ConfigError, DataConfig, KnnConfig
from fastmoco.config.command import CommandParser, as_seed
from fastmoco.data.order import stream_key
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.options import View, view_options

_LABELS, _HELD_OUT = 11, 12  # purposes of random streams


def _shuffled(n: int, *words: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_key(*words) >> 1)
    return torch.randperm(n, generator=generator)


def choose_labels(labels: Tensor, part: str, seed: int) -> Tensor:
    """Indices, ascending int64, of the images that keep their label; the same number per class.

    labels: int64 (n,). part: `all`, a share such as `1%`, or a number such as `5-per-class`. A
    share is taken of each class by itself, at least one image of each. Raises `ConfigError` for
    another text, or a class with fewer images than asked for.
    """
    if part == "all":
        return torch.arange(len(labels))
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", part)
    number = re.fullmatch(r"(\d+)-per-class", part)
    if not (share and 0 < float(share[1]) <= 100) and not (number and int(number[1])):
        raise ConfigError(f"--labels is {part}: write all, a share such as 10%, or 5-per-class.")
    kept = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        wanted = int(number[1]) if number else 0
        if share:
            wanted = max(1, round(float(share[1]) / 100 * len(rows)))
        if wanted > len(rows):
            raise ConfigError(
                f"--labels asks for {wanted} images per class, but class number {label} has only "
                f"{len(rows)}: ask for at most {len(rows)}."
            )
        kept.append(rows[_shuffled(len(rows), seed, label, _LABELS)[:wanted]])
    return torch.cat(kept).sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to choose settings on: two parts of range(n), balanced by class.

    A class of one image is trained on only. Raises `ConfigError` if nothing could be held out.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rows[_shuffled(len(rows), seed, label, _HELD_OUT)[:count]]] = True
    if not held.any():
        raise ConfigError(
            "One image per class leaves none to choose a learning rate on: use more --labels."
        )
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def labelled_parser(prog: str, description: str) -> CommandParser:
    """The options of every command that trains on labels; `prog` is "fastmoco COMMAND"."""
    options = CommandParser(prog=prog, description=description)
    folder = prog.split()[-1]
    add = options.add_argument
    add("--checkpoint", required=True, type=Path, help="any file or folder of weights")
    add("--data.root", default="", dest="root", help="folder with train and test/val")
    add("--train", default="", help="class folders or a labelled list; else from the root")
    add("--test", default="", help="class folders or a labelled list; else from the root")
    add("--out", type=Path, help=f"folder of results; default: {folder}/ beside the checkpoint")
    add("--labels", default="all", help="all, a share such as 1%%, or 5-per-class")
    add("--batch_size", type=int, default=256, help="over all ranks")
    add("--seed", type=as_seed, default=0)
    add("--workers", type=int, default=0, help="reader processes; 0 chooses")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    view_options(options)
    return options


def check_numbers(given: argparse.Namespace, **least: int) -> None:
    """Raises `ConfigError` for numbers that are too small; `least` names further options."""
    for name, low in {"epochs": 1, "batch_size": 1, **least}.items():
        if getattr(given, name) < low:
            raise ConfigError(f"--{name} is {getattr(given, name)}, but must be at least {low}.")


def both_folders(given: argparse.Namespace, view: View) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images in their evaluation view. Raises `ConfigError`."""
    named = KnnConfig(train_root=given.train, test_root=given.test)
    knn = resolve_folders(Config(data=DataConfig(root=given.root), knn=named)).knn
    roots = Path(knn.train_root), Path(knn.test_root)
    if not (knn.train_root and knn.test_root) or roots[1].is_relative_to(roots[0]):
        where = given.root or "--data.root"
        raise ConfigError(
            f"{where} needs a folder train, and test or val, of class folders: or name folders or "
            "labelled lists in --train and --test."
        )
    train, test = (
        LabelledImages(
            root,
            resize=view.resize,
            image_size=view.image_size,
            rule=view.rule,
            any_name=given.any_name == "true",
        )
        for root in roots
    )
    if os.environ.get("RANK", "0") == "0":
        for sentence in dict.fromkeys(train.warnings + test.warnings):
            print(f"WARNING: {sentence}", file=sys.stderr, flush=True)
    if train.class_names != test.class_names:
        raise ConfigError(f"{roots[0]} and {roots[1]} do not hold the same classes.")
    kept = choose_labels(train.labels, given.labels, given.seed)
    train.keep(kept.tolist())
    return train, test
