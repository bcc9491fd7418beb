"""Retrieval: mean average precision of a frozen encoder's neighbours, and a picture of them.

    python -m fastmoco.evaluate.retrieval --checkpoint FILE --data.root DIR --out neighbours.png

Every test image asks for the images of its class among those of the bank, ranked by the cosine of
their features. The average precision of a query is the mean, over the relevant images, of the
precision at their rank; mAP is its mean over queries that have a relevant image at all.

M bank samples, n queries, D feature dimension.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.data.pixels.deep import visible
from fastmoco.evaluate.features import extract_features
from fastmoco.evaluate.knn import ALONE, SIMILARITIES, nearest
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.monitor import KnnTask
from fastmoco.evaluate.options import Evaluation, command, evaluation_parser, labelled_options
from fastmoco.machine.collectives import all_reduce_mean_, gather_rows
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code
from fastmoco.weights import files


@torch.no_grad()
def average_precisions(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor
) -> Tensor:
    """float64 (n,) in [0, 1], NaN for a query without a relevant image.

    bank: fp32 (M, D), queries: fp32 (n, D), L2-normalized, on one device; labels: int64 (M,), (n,).
    Equally similar images keep the order of the bank. Memory is bounded whatever n is.
    """
    rows = max(1, SIMILARITIES // 8 // len(bank))
    ranks = torch.arange(1, len(bank) + 1, device=bank.device, dtype=torch.float64)
    found = []
    for part, wanted in zip(queries.split(rows), labels.split(rows), strict=True):
        order = (part @ bank.T).argsort(dim=1, descending=True, stable=True)
        relevant = (bank_labels[order] == wanted[:, None]).double()
        precision = relevant.cumsum(dim=1) / ranks
        found.append((precision * relevant).sum(dim=1) / relevant.sum(dim=1))
    return torch.cat(found)


_GAP, _LINE, _SIDE = 6, 16, 96


def draw_neighbours(
    bank: LabelledImages,
    test: LabelledImages,
    queries: Sequence[int],
    neighbours: Sequence[Sequence[int]],
) -> Image.Image:
    """A page: a row per query, the query first, then its nearest bank images.

    Names below; a neighbour of the query's class has a green frame, any other a red one.
    """
    cell, height = _SIDE + 2 * _GAP, _SIDE + 2 * _GAP + _LINE
    columns = 1 + max(map(len, neighbours))
    page = Image.new("RGB", (columns * cell + _GAP, len(queries) * height + _LINE + _GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    pen.text((_GAP, 2), "query", "black", font)
    pen.text((cell + 2 * _GAP, 2), "nearest images of the bank: green same class", "black", font)
    for row, (query, near) in enumerate(zip(queries, neighbours, strict=True)):
        shown = [(test, query, "black")]
        for i in near:
            same = bank.labels[i] == test.labels[query]
            shown.append((bank, i, "#2a9d2a" if same else "#cc3311"))
        for column, (images, i, colour) in enumerate(shown):
            left = _GAP + column * cell + (_GAP if column else 0)
            top = _LINE + _GAP + row * height
            view = Image.fromarray(np.ascontiguousarray(visible(images.load(i, i + 1)[0].numpy())))
            page.paste(view.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
            pen.rectangle((left - 2, top - 2, left + _SIDE + 1, top + _SIDE + 1), None, colour, 2)
            name = _fitting(images.class_names[int(images.labels[i])], font)
            pen.text((left, top + _SIDE + 2), name, "black", font)
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut at the end where it is wider than a picture."""
    if font.getlength(text) <= _SIDE:
        return text
    while text and font.getlength(f"{text}...") > _SIDE:
        text = text[:-1]
    return f"{text}..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one sentence for input that cannot be evaluated."""
    title = (__doc__ or "").split("\n")[0]
    options = evaluation_parser("fastmoco retrieval", title)
    labelled_options(options)
    options.add_argument("--out", type=Path, default=Path("neighbours.png"), help="the picture")
    options.add_argument("--queries", type=int, default=10, help="rows of the picture")
    options.add_argument("--neighbours", type=int, default=8, help="columns of the picture")
    return command(options, arguments, _retrieve)


def _retrieve(given: argparse.Namespace, world: World) -> None:
    if given.queries < 1 or given.neighbours < 1:
        raise ConfigError("--queries and --neighbours must be at least 1.")
    files.require_writable(given.out)  # before anything is computed
    evaluation = Evaluation.of(given, world)
    task = KnnTask(
        *evaluation.labelled_roots(given),
        world,
        resize=evaluation.view.resize,
        image_size=evaluation.view.image_size,
        rule=evaluation.view.rule,
        any_name=given.any_name == "true",
    )
    bank_share, test_share = (
        extract_features(
            evaluation.trunk,
            images,
            batch_size=given.batch_size,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
        )
        for images in (task.bank, task.test)
    )
    bank_share, bank_labels = task.good_features(bank_share, task.bank)
    test_share, labels = task.good_features(test_share, task.test)
    bank, queries = gather_rows(bank_share, world), gather_rows(test_share, world)
    bank_labels, labels = bank_labels.to(world.device), labels.to(world.device)
    mine = slice(world.rank, None, world.size)  # every rank ranks its part of the queries
    found = average_precisions(bank, bank_labels, queries[mine], labels[mine])
    sums = torch.stack([found.nansum(), (~found.isnan()).sum().double()])
    all_reduce_mean_([sums], world)
    if not sums[1]:
        raise ConfigError("No test image has an image of its class in the bank.")
    if world.is_main:
        score = 100 * float(sums[0] / sums[1])
        print(evaluation.describe())
        print(f"mAP {score:.2f} % of {len(queries)} queries, {len(bank)} bank")
        _picture(given, task, bank, queries)


def _picture(given: argparse.Namespace, task: KnnTask, bank: Tensor, queries: Tensor) -> None:
    """Draw evenly spaced queries and their neighbours."""
    places = [images.good(range(len(images))).nonzero()[:, 0] for images in (task.bank, task.test)]
    count = min(given.queries, len(queries))
    rows = [i * len(queries) // count for i in range(count)]
    _, near = nearest(bank, 0, queries[rows], min(given.neighbours, len(bank)), ALONE)
    page = draw_neighbours(
        task.bank, task.test, places[1][rows].tolist(), places[0][near.cpu()].tolist()
    )
    files.write(given.out, lambda partial: page.save(partial, "PNG"))
    print(given.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
