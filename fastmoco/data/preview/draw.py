"""Pictures of views: originals beside their two views, from both executors of the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmoco.config import Config, ConfigError
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.backends.dali.reader import Delivery
from fastmoco.data.backends.float_views import FloatCanvas
from fastmoco.data.backends.pil import execute
from fastmoco.data.backends.synthetic import SyntheticEngine
from fastmoco.data.decode import decode
from fastmoco.data.loader import make_plan
from fastmoco.data.pixels.deep import Deep, visible
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.preview import replay
from fastmoco.data.preview.sheet import Column, captions, sheet
from fastmoco.data.reader import Reader, Work, read_work
from fastmoco.data.sources.choose import open_source
from fastmoco.data.table import UInt8, ViewTable
from fastmoco.machine import durable

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""What PIL calls the format of a picture with this suffix."""


def draw_views(config: Config, path: Path, *, samples: int = 8, step: int = 0) -> None:
    """Writes a picture: one row per sample of the step, original, im_q and im_k per executor.

    config: from `resolve_pixels`.
    Raises `ConfigError` for unusable data, `OSError` if the picture cannot be written.
    """
    side = config.augment.image_size
    if config.data.source == "synthetic":
        plan = make_plan(config, None, config.data.synthetic_samples)
        noise = SyntheticEngine(config, plan, torch.device("cpu")).next()
        both = {"im_q": noise.im_q, "im_k": noise.im_k}
        columns = [Column(name, list(views[:samples].numpy())) for name, views in both.items()]
        return write(path, columns, side)
    source = open_source(config)
    plan = make_plan(config, source, len(source.sizes))
    reader = Reader(source, config.run.seed, PixelRule.of(config.data))
    rows = slice(0, min(samples, plan.local_batch))
    micro_step = step * config.optim.accumulate
    work = read_work(reader, plan, config.augment, micro_step, rows)
    rule, recipe = reader.rule, config.augment.recipe
    images = [one.deep or decode(one.data, rule) for one in work.queries]
    columns = [Column("original", [_fit(_shown(image), side) for image in images])]
    canvas = FloatCanvas(side, recipe, rule.channels, "pil")
    tables = {"im_q": work.rows_q, "im_k": work.rows_k}
    for name, packed in tables.items():
        table = ViewTable.unpack(packed)
        views = [
            visible(canvas.execute(image, table, row))
            if isinstance(image, Deep)
            else execute(image, table, row, side, recipe)
            for row, image in enumerate(images)
        ]
        columns.append(Column(f"{name}, by PIL", views, captions(table, [i.size for i in images])))
    dali = has_dali() and config.data.backend in ("auto", "dali")
    if dali and not rule.float_views:
        for name, batch in zip(tables, _by_dali(config, work), strict=True):
            columns.append(Column(f"{name}, by DALI", list(batch)))
    write(path, columns, side)


def draw_replay(step: replay.SavedStep, path: Path, *, samples: int = 8) -> int:
    """Writes a picture of the views that a step got; how many samples its batch has.

    Raises `ConfigError` and `OSError` as `draw_views` does, also where the images have changed.
    """
    config = step.config
    cuda = config.run.device != "cpu" and torch.cuda.is_available()
    parts = replay.batches(step, torch.device("cuda" if cuda else "cpu"))
    numbers = [number for part in step.samples for number in part]
    columns = []
    for name in ("im_q", "im_k"):
        views = torch.cat([getattr(part, name) for part in parts])[:samples].cpu().numpy()
        pictures = [visible(view) for view in views]
        columns.append(Column(name, pictures, [[f"sample {number}"] for number in numbers]))
    write(path, columns, config.augment.image_size)
    return len(numbers)


def kind_of(path: Path) -> str:
    """PIL's name for the format of a picture. Raises `ConfigError` for another suffix."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {path} must end in {' or '.join(FORMATS)}.")
    return FORMATS[path.suffix.lower()]


def write(path: Path, columns: Sequence[Column], side: int) -> None:
    """The columns as a picture, which appears whole. Raises as `draw_views` does."""
    kind, page = kind_of(path), sheet(columns, side)
    durable.replace(path, lambda partial: page.save(partial, kind))


def _by_dali(config: Config, work: Work) -> list[UInt8]:
    # Imported by name: only where DALI is installed.
    from fastmoco.data.backends.dali import graph

    shape = graph.Shape(config.augment.image_size, "cpu", False)
    delivery = Delivery.pack(work, config.augment.recipe)
    return [batch.numpy() for batch in graph.run_once(delivery, shape)]


def _shown(image: Image.Image | Deep) -> Image.Image:
    if isinstance(image, Deep):
        whole = image.box(0, 0, *image.size[::-1])
        return Image.fromarray(visible(whole.transpose(1, 2, 0)))
    return image.copy()


def _fit(image: Image.Image, side: int) -> UInt8:
    """The whole image, scaled into a black square."""
    image.thumbnail((side, side))
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)
