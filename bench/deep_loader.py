"""Processor time of deep pictures, 16-bit PNGs and 13-channel arrays, against torchvision v2.

    python -m bench.deep_loader

CPU milliseconds per picture, of reading and of two views of 224 pixels, as one worker process of
the loader spends them: a busy machine changes them less than pictures per second. The pictures are
rendered: 16-bit gray PNGs of 512 x 512 pixels, and 13 channels of 256 x 256 as NPY. torchvision's
pipeline is the plain one: read, map the range to 0..1, random resized crop, brightness and
contrast, blur, flip, normalize, all on float32 tensors, and a batch of them. Its blur has 13 taps,
three standard deviations of the widest one, as many as ours. Also measured: CPU seconds of the look
at a sample that a first start takes, for a folder --root of JPEGs too.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2 as transforms_v2

from bench.loader import BATCH, PROCESSES
from bench.measure.contest import in_turns
from bench.measure.program import Options, command, parser, progress
from bench.measure.rows import Row, quantiles, spread
from fastmoco.config import AugmentConfig, Config, DataConfig, KnnConfig, OptimConfig, RunConfig
from fastmoco.data.backends.workers import Parts
from fastmoco.data.loader import make_plan
from fastmoco.data.pixels import survey
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import Reader
from fastmoco.data.sources.choose import open_source, resolve_folders

v2: Any = transforms_v2  # its annotations name no transforms
KINDS = {"16-bit PNG": (1, 512), "13-channel NPY": (13, 256)}
"""Channels and side of the pictures."""
PICTURES = 256
NO_COLOUR = AugmentConfig(saturation=0, hue=0, grayscale_p=0)


def render(folder: Path, kind: str) -> None:
    """Smooth pictures with some noise, in 12 of 16 bits."""
    channels, side = KINDS[kind]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for number in range(PICTURES):
        fx, fy, phase = rng.uniform(2, 20, 3)
        wave = 1800 * (1 + np.sin(fx * x + fy * y + phase))
        noise = rng.integers(0, 64, (channels, side, side))
        pixels = (wave + noise).astype(np.uint16)
        if kind == "16-bit PNG":
            Image.fromarray(pixels[0]).save(folder / f"{number:04d}.png")
        else:
            np.save(folder / f"{number:04d}.npy", pixels)


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two views of a file by torchvision's v2 transforms."""

    def __init__(self, folder: Path, data: DataConfig) -> None:
        assert not isinstance(data.intensity, str)
        assert not isinstance(data.mean, str)
        assert not isinstance(data.std, str)
        self.paths = sorted(folder.iterdir())
        self.low, self.high = data.intensity
        jitter = v2.RandomApply([v2.Lambda(self.jitter)], 0.8)
        self.views = v2.Compose(
            [
                v2.RandomResizedCrop(224, (0.2, 1), antialias=True),
                jitter,
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5),
                v2.RandomHorizontalFlip(),
                v2.Normalize(data.mean, data.std),
            ]
        )

    @staticmethod
    def jitter(image: torch.Tensor) -> torch.Tensor:
        """Brightness and contrast; those of v2 take one or three channels only."""
        brightness, contrast = random.uniform(0.6, 1.4), random.uniform(0.6, 1.4)
        image = image * brightness
        mean = image.mean((1, 2), keepdim=True)
        return mean + contrast * (image - mean)

    def __len__(self) -> int:
        return 2**30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.paths[index % len(self.paths)]
        pixels = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))[None]
        image = (torch.from_numpy(pixels.astype(np.float32)) - self.low) / (self.high - self.low)
        return self.views(image), self.views(image)


def plain_ms(views: Plain) -> float:
    """CPU milliseconds per picture of a batch of `Plain`."""
    began = time.process_time()
    default_collate([views[index] for index in range(BATCH)])
    return (time.process_time() - began) * 1000 / BATCH


def ours_ms(parts: Parts) -> float:
    """The same of the part that a worker of the loader makes of a batch."""
    began = time.process_time()
    parts[0]
    return (time.process_time() - began) * 1000 / BATCH


def configuration(folder: Path, run: str, channels: int, backend: str) -> Config:
    """MoCo v2 without colour at 224 pixels, two workers, 50 pictures per batch."""
    data = DataConfig(
        root=str(folder),
        channels=channels,
        backend=backend,  # type: ignore[arg-type]
        workers=PROCESSES,
    )
    config = Config(
        run=RunConfig(dir=run),
        data=data,
        augment=NO_COLOUR,
        optim=OptimConfig(global_batch_size=BATCH),
        knn=KnnConfig(every=0),
    )
    return resolve_pixels(resolve_folders(config))


def parts_of(config: Config) -> Parts:
    """What the workers of the loader have, in this process."""
    source = open_source(config)
    reader = Reader(source, config.run.seed, PixelRule.of(config.data))
    plan = make_plan(config, source, len(source.sizes))
    parts = Parts(reader, plan, config.augment, config.data.backend)
    parts.slots = torch.empty(1, *parts.shape, dtype=parts.dtype)
    return parts


def look_s(root: str, channels: int, sample: int) -> float:
    """CPU seconds of the look at a sample of that many pictures, with the index at hand."""
    data = DataConfig(root=root, channels=channels)
    source = open_source(resolve_folders(Config(data=data, knn=KnnConfig(every=0))))
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, FASTMOCO_CACHE=cache),
        mock.patch.object(survey, "SAMPLE", sample),
    ):
        began = time.process_time()
        survey.survey(source, PixelRule.of(data))
        return time.process_time() - began


def pipelines(kind: str, folder: Path, run: str, windows: int) -> list[Row]:
    """Rows of one kind of picture; ratios by turn: how many times ours torchvision takes."""
    channels, side = KINDS[kind]
    render(folder, kind)
    array, pil = (configuration(folder, run, channels, name) for name in ("array", "pil"))
    work = {
        "torchvision v2": partial(plain_ms, Plain(folder, array.data)),
        "array": partial(ours_ms, parts_of(array)),
        "pil": partial(ours_ms, parts_of(pil)),
    }
    found = in_turns(work, windows, after=progress(windows))
    case = {"part": kind, "unit": "CPU ms/picture", "image_size": 224, "side": side}
    return [
        {
            "benchmark": "deep_loader",
            "case": case,
            "contestant": name,
            **spread(values, 3),
            "ratios": quantiles(
                [b / a for a, b in zip(values, found["torchvision v2"], strict=True)], 3
            ),
        }
        for name, values in found.items()
    ]


def looks(roots: Mapping[str, tuple[str, int]], windows: int) -> list[Row]:
    """Rows of the look at 64 and at 256 pictures; roots: folder and channels by kind."""
    work = {
        (kind, sample): partial(look_s, root, channels, sample)
        for kind, (root, channels) in roots.items()
        for sample in (64, survey.SAMPLE)
    }
    found = in_turns({f"{k}, {n}": do for (k, n), do in work.items()}, windows)
    return [
        {
            "benchmark": "deep_loader",
            "case": {"part": "look at a sample", "unit": "CPU s", "pictures": sample},
            "contestant": kind,
            **spread(found[f"{kind}, {sample}"], 3),
        }
        for kind, sample in work
    ]


PARSER = parser("deep_loader", __doc__, only=False, steps=False)
PARSER.add_argument("--root", default="", help="a folder of JPEGs")


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """The rows of each kind of picture, then those of the look at a sample."""
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")  # as in a worker of the loader
    with tempfile.TemporaryDirectory() as place:
        roots = {"8-bit JPEG": (own.root, 3)} if own.root else {}
        for kind, (channels, _) in KINDS.items():
            folder = Path(place) / kind
            folder.mkdir()
            yield pipelines(kind, folder, place, own.windows)
            roots[kind] = str(folder), channels
        yield looks(roots, min(own.windows, 5))


if __name__ == "__main__":
    sys.exit(main())
