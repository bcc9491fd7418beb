"""Pictures for the page about a run: what its encoder holds to be alike.

Untrained, and at the first and the last checkpoint that were kept: ten test images with their
nearest training images, and a map of the features of test images in the plane of their largest
variance (PCA: no parameter, no chance, the same every time).

n images, D feature dimension.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.config.names import in_figure
from fastmoco.evaluate.features import BATCH_SIZE, FrozenTrunk, stream_features
from fastmoco.evaluate.knn import ALONE, nearest
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.options import Evaluation, evaluation_parser, labelled_options, untrained
from fastmoco.evaluate.retrieval import draw_neighbours
from fastmoco.machine.ranks import World

QUERIES, NEIGHBOURS = 10, 8
BANK_IMAGES, TEST_IMAGES = 2000, 500
"""At most so many images, evenly spaced: the page is for the eye, `knn` and `retrieval` measure."""
# Okabe and Ito's colours with a mark each, so that colour alone tells nothing apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b")
_MARKS = ("o", "^", "s", "x")
_OTHERS = "#b0b4ba"


def checkpoints(run: Path) -> list[Path]:
    """The first and the last checkpoint of a run directory; one where there is only one.

    Raises `ConfigError` where there is none.
    """
    steps = re.compile(r"step(\d+)\.pth\.tar$")
    found = [(int(m[1]), path) for path in run.iterdir() if (m := steps.search(path.name))]
    if not found:
        raise ConfigError(f"{run} holds no checkpoint, so there are no features to draw.")
    ordered = [path for _, path in sorted(found)]
    return ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]


def pictures(run: Path, root: str, device: torch.device) -> list[tuple[str, str, bytes]]:
    """Title, caption and PNG of each picture.

    root: a folder with `train` and `test` (or `val`). Raises `ConfigError` for images or
    checkpoints that cannot be used.
    """
    parser = evaluation_parser("fastmoco report", "")
    labelled_options(parser)
    world = World(0, 0, 1, device, "none")
    found: list[tuple[str, str, bytes]] = []
    sets: tuple[LabelledImages, LabelledImages] | None = None
    for path in checkpoints(run):
        given = parser.parse_args(["--checkpoint", str(path), "--data.root", root])
        evaluation = Evaluation.of(given, world)
        if sets is None:
            sets = _both(evaluation, *evaluation.labelled_roots(given))
            found += _of_checkpoint(untrained(evaluation, world), *sets, "untrained")
        epoch = evaluation.weights.epoch
        when = path.name if epoch is None else f"epoch {epoch}"
        found += _of_checkpoint(evaluation.trunk, *sets, when)
    return found


def _both(
    evaluation: Evaluation, train_root: Path, test_root: Path
) -> tuple[LabelledImages, LabelledImages]:
    bank, test = (
        LabelledImages(
            where,
            resize=evaluation.view.resize,
            image_size=evaluation.view.image_size,
            max_images=most,
            rule=evaluation.view.rule,
        )
        for where, most in ((train_root, BANK_IMAGES), (test_root, TEST_IMAGES))
    )
    return bank, test


def _of_checkpoint(
    trunk: FrozenTrunk, bank: LabelledImages, test: LabelledImages, when: str
) -> list[tuple[str, str, bytes]]:
    (bank_features, bank_places), (features, places) = (
        _good_features(trunk, images, when) for images in (bank, test)
    )
    count = min(QUERIES, len(features))
    rows = [i * len(features) // count for i in range(count)]
    most = min(NEIGHBOURS, len(bank_features))
    _, near = nearest(bank_features, 0, features[rows], most, ALONE)
    page = draw_neighbours(bank, test, places[rows].tolist(), bank_places[near.cpu()].tolist())
    drawn = io.BytesIO()
    page.save(drawn, "PNG")
    points, shares = principal_plane(features)
    return [
        (
            f"Nearest images, {when}",
            f"{count} test images and their {most} nearest of {len(bank_features)} training "
            "images: green frames have the class of the query.",
            drawn.getvalue(),
        ),
        (
            f"Map of features, {when}",
            f"{len(features)} test images in the plane of their largest variance (PCA), which "
            f"holds {100 * sum(shares):.0f} % of it.",
            draw_map(points, test.labels[places].tolist(), test.class_names),
        ),
    ]


def _good_features(trunk: FrozenTrunk, images: LabelledImages, what: str) -> tuple[Tensor, Tensor]:
    """Normalized features (n, D) of the good images, and their numbers."""
    every = range(len(images))
    parts = stream_features(trunk, images, every, batch_size=BATCH_SIZE, device=trunk.device)
    total = math.ceil(len(images) / BATCH_SIZE)
    bar = tqdm(parts, f"features, {what}", total, leave=False, disable=None)
    rows = torch.cat([functional.normalize(part, dim=1) for part in bar])
    good = images.good(every)
    if not good.any():
        raise ConfigError(f"No image can be used: {images.bad_sentence('images')}")
    return rows[good.to(rows.device)], good.nonzero()[:, 0]


def principal_plane(features: Tensor) -> tuple[Tensor, list[float]]:
    """Coordinates (n, 2) in the two directions of largest variance, and their shares of it.

    features: (n, D). The sign of a direction is the one with which its largest entry is positive.
    """
    centred = (features - features.mean(dim=0)).double().cpu()
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = functional.pad(directions[:2], (0, 0, 0, 2 - len(directions[:2])))
    largest = plane.gather(1, plane.abs().argmax(dim=1, keepdim=True))
    plane = torch.where(largest < 0, -plane, plane)
    energy = spread.square()
    shares = (energy[:2] / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return centred @ plane.T, shares


def draw_map(points: Tensor, labels: Sequence[int], names: Sequence[str]) -> bytes:
    """PNG of the points (n, 2), a colour and a mark for each of the most frequent classes."""
    figure = Figure((7.2, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    counts = torch.bincount(torch.tensor(labels), minlength=len(names))
    styles = [(mark, colour) for mark in _MARKS for colour in _COLOURS]
    shown = counts.argsort(descending=True, stable=True)[: len(styles)].tolist()
    shown = sorted(label for label in shown if counts[label])
    own = torch.tensor(labels)
    rest = ~torch.isin(own, torch.tensor(shown))
    if rest.any():
        across, up = points[rest].T.numpy()
        axes.scatter(across, up, s=10, color=_OTHERS, label="other classes")
    for (mark, colour), label in zip(styles, shown, strict=False):
        across, up = points[own == label].T.numpy()
        name = in_figure(names[label])
        axes.scatter(across, up, s=22, marker=mark, color=colour, label=name, linewidths=1)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()
