"""How fast nvJPEG decodes the images of a source through torchvision, beside the CPU's decoder.

Takes the options of `fastmoco.train`. Decoding only: neither reading nor crops. Where there is no
GPU, or a torchvision without nvJPEG, only the CPU's decoder is timed, and it says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torchvision.io import ImageReadMode, decode_jpeg

from bench.measure.contest import in_turns, synchronize
from bench.measure.program import Options, command, complain, parser
from bench.measure.rows import Row, spread
from fastmoco.config import Config
from fastmoco.data.sources.choose import open_source, resolve_folders


def encoded(config: Config, count: int) -> list[torch.Tensor]:
    """`count` JPEG files of the source, each as uint8 (B,) of its bytes."""
    source = open_source(resolve_folders(config))
    found = (source.read(i % len(source.sizes)) for i in range(count))
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in found]


def decoding(images: list[torch.Tensor], device: torch.device) -> Callable[[], float]:
    """A function that decodes all images to RGB on `device` and returns images per second."""

    def run() -> float:
        began = time.perf_counter()
        if device.type == "cpu":
            for image in images:
                decode_jpeg(image, ImageReadMode.RGB)
        else:
            decode_jpeg(images, ImageReadMode.RGB, device=device)
            synchronize(device)
        return len(images) / (time.perf_counter() - began)

    return run


@command(parser("nvjpeg", __doc__, only=False, steps=False))
def main(own: Options) -> Iterator[list[Row]]:
    """One row per decoder."""
    images = encoded(own.config, own.config.optim.global_batch_size)
    work = {"libjpeg-turbo, one thread": decoding(images, torch.device("cpu"))}
    if own.device.type == "cuda":
        try:
            decoding(images[:1], own.device)()
            work["nvJPEG"] = decoding(images, own.device)
        except RuntimeError as error:
            complain("nvjpeg", f"torchvision cannot decode on this GPU: {error}")
    else:
        complain("nvjpeg", "no GPU, so only the CPU's decoder is timed.")
    source = own.config.data.source
    case = {"part": "decode", "unit": "images/s", "batch": len(images), "data": source}
    yield [
        {"benchmark": "nvjpeg", "case": case, "contestant": name, **spread(values, 3)}
        for name, values in in_turns(work, own.windows).items()
    ]


if __name__ == "__main__":
    sys.exit(main())
