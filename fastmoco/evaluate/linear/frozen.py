"""A frozen trunk from any checkpoint, and its features of fixed crops stored once on disk.

n images, V crops of each, S side of a crop, D feature dimension.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.data.backends.array import Canvas
from fastmoco.data.backends.engine import Executor
from fastmoco.data.backends.float_views import FloatCanvas
from fastmoco.data.order import EpochOrder
from fastmoco.data.pixels.deep import Deep
from fastmoco.data.pixels.rule import BadImage, PixelRule
from fastmoco.data.table import draw_uniforms, view_table
from fastmoco.evaluate.features import FrozenTrunk, filled_up, trunk_of
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.labelled_training import crop_and_flip
from fastmoco.machine import durable
from fastmoco.network.encoder import pixel_statistics
from fastmoco.weights.read import read


class CheckedTrunk(FrozenTrunk):
    """The frozen trunk of a checkpoint, fp32, that can tell whether it is still what it was.

    Raises `ConfigError` as `fastmoco.weights.read` does.
    """

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        self.weights = read(checkpoint)
        trunk = trunk_of(self.weights).requires_grad_(False).to(device).eval()
        statistics = pixel_statistics(self.weights.pixels)
        super().__init__(trunk, torch.float32, device, statistics)

    @property
    def features(self) -> int:
        """D."""
        return self.weights.features

    def fingerprint(self) -> str:
        """SHA-256 of every weight and statistic: equal exactly where the trunk is, bit for bit."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _canvas(side: int, rule: PixelRule) -> Executor:
    recipe = crop_and_flip(side).recipe
    if rule.float_views:
        return FloatCanvas(side, recipe, rule.channels, "array")
    return Canvas(side, recipe)


def random_crops(images: LabelledImages, rows: Sequence[int], crop: int, seed: int) -> Tensor:
    """Crop number `crop` of some images, (len(rows), S, S, C): what training would show.

    It is the view that the training loader shows of the image in epoch `crop`, drawn from the
    image's position in that epoch. That of a bad image is black, and `images.bad` has the reason.
    """
    n, side = len(images), images.image_size
    augment = crop_and_flip(side)
    position = np.empty(n, np.int64)
    position[EpochOrder(n, seed, 0, ()).samples(crop, np.arange(n))] = np.arange(n)
    rule = images.rule
    kind = np.float32 if rule.float_views else np.uint8
    out = np.empty((len(rows), side, side, rule.channels), kind)

    def one(index: int) -> None:
        row, canvas = rows[index], _canvas(side, rule)
        try:
            image = canvas.decode(images.read(row), rule)
        except BadImage as error:
            images.bad[row], out[index] = str(error), 0
            return
        height, width = (image.values if isinstance(image, Deep) else image).shape[1:]
        size = np.array([[width, height]], np.int32)
        uniforms = draw_uniforms(seed, crop, 0, int(position[row]), 1)
        out[index] = canvas.execute(image, view_table(augment, uniforms, size), 0)

    one_each = threadpool_limits(1, user_api="blas")  # a thread of BLAS in each of these threads
    with one_each, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(one, range(len(rows))))
    return torch.from_numpy(out)


def stored_features(
    trunk: CheckedTrunk,
    images: LabelledImages,
    folder: Path,
    *,
    device: torch.device,
    crops: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Features (V, n, D) fp32 on the CPU, mapped from a file in `folder` that is computed once.

    crops 0: V = 1, the centre crop; else V = crops random ones, fixed by `seed`. Features of a bad
    image are NaN. The file's name holds a hash of the weights, the list of images and the view. An
    interrupted computation goes on at the batch it had reached. Raises `ConfigError` where the file
    cannot be written.
    """
    shown = [images.resize, images.image_size, asdict(images.rule), trunk.statistics]
    said = [trunk.fingerprint(), *shown, crops, seed if crops else 0]
    stamps = [(str(path), *images.stamp(i)) for i, path in enumerate(images.paths)]
    name = hashlib.sha256(json.dumps([said, stamps]).encode()).hexdigest()[:24]
    path, note = folder / f"features-{name}.npy", folder / f"features-{name}.json"
    views, shape = max(crops, 1), (max(crops, 1), len(images), trunk.features)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _batches_done(note, batch_size) if path.exists() else 0
        mode = "r+" if done else "w+"
        stored = np.lib.format.open_memmap(path, mode, np.float32, shape)
        starts = [(v, s) for v in range(views) for s in range(0, len(images), batch_size)]
        bar = tqdm(starts, "features", initial=done, unit="batch", disable=not progress)
        bar.update(done)
        for number, (view, start) in list(enumerate(starts))[done:]:
            stop = min(start + batch_size, len(images))
            rows = range(start, stop)
            pixels = random_crops(images, rows, view, seed) if crops else images.load(start, stop)
            full = filled_up(pixels, batch_size).to(device)
            stored[view, start:stop] = trunk(full)[: len(rows)].cpu().numpy()
            stored[view, [row for row in rows if row in images.bad]] = np.nan
            if number % 64 == 63 or number + 1 == len(starts):
                stored.flush()
                told = json.dumps({"batches": number + 1, "of": batch_size})
                durable.replace(note, partial(_write, told))
            bar.update()
        bar.close()
    except OSError as error:
        raise ConfigError(f"Features cannot be stored in {folder}: {error}.") from error
    return torch.from_numpy(stored)


def _write(text: str, file: Path) -> None:
    file.write_text(text)


def _batches_done(note: Path, batch_size: int) -> int:
    """How many batches of this size a note counts; 0 where it is lost, damaged or of others."""
    try:
        kept = json.loads(durable.read_regular(note))
        return int(kept["batches"]) if kept["of"] == batch_size else 0
    except (OSError, ValueError, TypeError, LookupError):
        return 0
