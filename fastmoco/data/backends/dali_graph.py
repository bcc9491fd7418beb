"""DALI executes the table: one definition for the CPU and for the GPU. The only importer of DALI.

Decoding, crop and flip are exact against PIL. Resize differs by rounding and blur by the shape of
the kernel (PIL stacks box filters). Colour is composed from arithmetic, because DALI's own
operators rotate hue linearly, blend contrast with a constant and fix the order of operations; see
docs/augmentation.md for what each choice costs.

n local batch, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from nvidia.dali import fn
    from nvidia.dali import math as dali_math
    from nvidia.dali import types as dali_types
    from nvidia.dali.pipeline import Pipeline, pipeline_def
    from nvidia.dali.plugin import pytorch as dali_pytorch
except ImportError:  # every module of fastmoco can be imported without DALI
    fn = dali_math = dali_types = dali_pytorch = None  # type: ignore[assignment]
    pipeline_def = Pipeline = None  # type: ignore[assignment, misc]

from fastmoco.data.backends import dali_rows as columns
from fastmoco.data.backends.dali_rows import KINDS

Node = Any
Delivery = tuple[list[NDArray[Any]], ...]

types: Any = dali_types  # its constants are added at import, unseen by type checkers
plugin: Any = dali_pytorch
define: Any = pipeline_def
# Torch's own subclasses of RuntimeError: no image causes them.
NOT_DALI = (torch.OutOfMemoryError, torch.AcceleratorError)

# PIL truncates a blend where DALI rounds: half a level less, and a little more, so that exact
# integers stay what they are.
_TRUNCATE = -0.499
_CONTRAST, _SATURATION = KINDS[1], KINDS[2]


@dataclass(frozen=True)
class Shape:
    """What the definition depends on besides the rows."""

    side: int
    """S."""
    recipe: str
    """`v1` turns gray before the jitter, `v2` after it."""
    device: str
    """`cpu` or `gpu`."""
    two_decodes: bool
    """Whether queries and keys are different images."""
    one_view: bool = False
    """Whether there are no keys."""


def decode(data: Node, device: str) -> Node:
    """Encoded bytes to uint8 (H, W, 3) RGB, as PIL: no EXIF rotation, triangle upsampling."""
    return fn.decoders.image(
        data,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def crop(image: Node, row: Node, side: int) -> Node:
    """The row's box, resized with antialiased bilinear interpolation."""
    box = fn.cast(row[columns.BOX], dtype=types.INT32)
    cut = fn.slice(image, start=box[0:2], shape=box[2:4], axes=(0, 1))
    return fn.resize(
        cut, size=[side, side], mag_filter=types.INTERP_LINEAR, min_filter=types.INTERP_TRIANGULAR
    )


def gray_plane(view: Node) -> Node:
    """Luminance as uint8 (S, S, 1), with PIL's weights."""
    return fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)


def blend(view: Node, kind: Node, factor: Node, device: str) -> Node:
    """y = f x + (1 - f) d in uint8; kind and factor: scalars of the sample."""
    if kind == _SATURATION:
        mixed = view * factor + gray_plane(view) * (1.0 - factor) + _TRUNCATE
        view = fn.cast(mixed, dtype=types.UINT8)
    else:
        if kind == _CONTRAST:
            mean = fn.reductions.mean(gray_plane(view), dtype=types.FLOAT)
            center = dali_math.floor((mean.cpu() if device == "gpu" else mean) + 0.5)
        else:
            center = types.Constant(0.0, dtype=types.FLOAT, device="cpu")
        view = fn.brightness_contrast(
            view, contrast=factor, contrast_center=center, brightness_shift=_TRUNCATE / 255
        )
    return view


def shift_hue(view: Node, amount: Node) -> Node:
    """PIL's way through HSV, with its roundings: amount in 1/256 turn, a scalar of the sample."""
    red, green, blue = (view[:, :, plane : plane + 1] * 1.0 for plane in range(3))
    value = dali_math.max(dali_math.max(red, green), blue)
    chroma = value - dali_math.min(dali_math.min(red, green), blue)
    from_red, from_green = red == value, green == value
    sextants = from_red * (green - blue) + (1.0 - from_red) * (
        from_green * (2.0 * chroma + blue - red) + (1.0 - from_green) * (4.0 * chroma + red - green)
    )
    turns = sextants / (6.0 * dali_math.max(chroma, 1.0))
    hue = dali_math.floor((turns - dali_math.floor(turns)) * 255.0) + amount
    hue = hue - 256.0 * (hue >= 256.0)
    saturation = dali_math.floor(chroma * 255.0 / dali_math.max(value, 1.0))
    depth = value * saturation * (1.0 / 255.0)
    planes = []
    for offset in (5.0, 3.0, 1.0):
        angle = hue * (6.0 / 255.0) + offset
        angle = angle - 6.0 * (angle >= 6.0)
        ramp = dali_math.clamp(dali_math.min(angle, 4.0 - angle), 0.0, 1.0)
        planes.append(value - depth * ramp)
    return fn.cast(fn.cat(*planes, axis=2), dtype=types.UINT8)


def jitter(view: Node, row: Node, device: str) -> Node:
    """The row's colour programme, if it has one."""
    if row[columns.JITTER] > 0:
        for first in (columns.BEFORE, columns.AFTER):
            for slot in range(first, first + 2 * columns.SLOTS, 2):
                if row[slot] > 0:
                    view = blend(view, row[slot], row[slot + 1], device)
            # Two ifs: Python decides the outer one, DALI the inner one per sample.
            if first == columns.BEFORE:  # noqa: SIM102
                if row[columns.SHIFTS] > 0:
                    view = shift_hue(view, row[columns.SHIFT])
    return view


def turn_gray(view: Node, row: Node) -> Node:
    """Three equal channels, if the row says so."""
    if row[columns.GRAY] > 0:
        view = fn.color_space_conversion(
            gray_plane(view), image_type=types.GRAY, output_type=types.RGB
        )
    return view


def blur(view: Node, row: Node) -> Node:
    """Gaussian blur with the row's sigma in a window as wide as PIL's, none at 0."""
    if row[columns.SIGMA] > 0:
        window = fn.cast(row[columns.WINDOW], dtype=types.INT32)
        view = fn.gaussian_blur(view, sigma=row[columns.SIGMA], window_size=window)
    return view


def execute(image: Node, row: Node, shape: Shape) -> Node:
    """One view of an image: uint8 (S, S, 3)."""
    view = crop(image, row, shape.side)
    if shape.recipe == "v1":
        view = jitter(turn_gray(view, row), row, shape.device)
    else:
        view = turn_gray(jitter(view, row, shape.device), row)
    view = blur(view, row)
    return fn.flip(view, horizontal=fn.cast(row[columns.FLIP], dtype=types.INT32))


def two_views(
    source: Callable[[Any], Delivery], shape: Shape, prefetch: int, parallel: bool
) -> Any:
    """im_q, im_k (unless `one_view`) and `replaced` of the micro-batches of the source."""
    kinds = [types.UINT8, types.FLOAT, types.FLOAT, types.INT64]
    if shape.two_decodes:
        kinds.append(types.UINT8)
    if shape.one_view:
        kinds = [types.UINT8, types.FLOAT, types.INT64]
    inputs = fn.external_source(
        source,
        num_outputs=len(kinds),
        batch=True,
        parallel=parallel,
        prefetch_queue_depth=prefetch if parallel else None,
        dtype=kinds,
        ndim=[1] * len(kinds),
    )
    if shape.one_view:
        data, row_q, replaced = inputs
        return execute(decode(data, shape.device), row_q, shape), replaced
    data, row_q, row_k, replaced = inputs[:4]
    image_q = decode(data, shape.device)
    image_k = decode(inputs[4], shape.device) if shape.two_decodes else image_q
    return execute(image_q, row_q, shape), execute(image_k, row_k, shape), replaced


def only_decode(data: list[NDArray[np.uint8]], device: str) -> Any:
    """The decoded images of a fixed list of encoded ones."""
    return decode(fn.external_source(lambda: data, batch=True, dtype=types.UINT8, ndim=1), device)


def decode_all(data: list[bytes], device_id: int | None = None) -> list[NDArray[np.uint8]]:
    """Every image as uint8 (H, W, 3) on the host. Raises `RuntimeError` if DALI refuses one."""
    pipe = define(only_decode)(
        [np.frombuffer(one, np.uint8) for one in data],
        "cpu" if device_id is None else "gpu",
        batch_size=len(data),
        num_threads=1,
        device_id=device_id,
        prefetch_queue_depth=1,
    )
    images: Any = pipe.run()[0]
    return [np.array(image) for image in (images if device_id is None else images.as_cpu())]


def decode_fed(device: str) -> Any:
    """The image that is fed to the input `data`."""
    return decode(fn.external_source(name="data", dtype=types.UINT8, ndim=1), device)


def decoder_of_one(device_id: int | None) -> Any:
    """A pipeline that decodes one image at a time."""
    options = {"batch_size": 1, "num_threads": 1, "prefetch_queue_depth": 1}
    return define(decode_fed)("cpu" if device_id is None else "gpu", device_id=device_id, **options)


def refused_by_decoder(data: list[bytes], device_id: int | None) -> list[int]:
    """Which of these DALI does not decode, by their places in the list.

    One after another through one pipeline; only where DALI gives it up a new one is built. As a
    batch they would be quicker, but there a broken image can end DALI 2.4 by a segmentation fault.
    """
    refused: list[int] = []
    pipe: Any = None
    for at, one in enumerate(data):
        pipe = pipe or decoder_of_one(device_id)
        try:
            pipe.feed_input("data", [np.frombuffer(one, np.uint8)])
            pipe.run()
        except NOT_DALI:
            raise
        except RuntimeError:
            refused.append(at)
            pipe = None
    return refused


def to_torch(outputs: Any, device: torch.device) -> list[Tensor]:
    """Copies of DALI's outputs, which it reuses; on a GPU ordered with the current stream."""
    copies = []
    for dense in (output.as_tensor() for output in outputs):
        dtype = torch.uint8 if dense.dtype == types.UINT8 else torch.int64
        on_device = device.type == "cuda" and "GPU" in type(dense).__name__
        copy = torch.empty(dense.shape(), dtype=dtype, device=device if on_device else "cpu")
        stream = torch.cuda.current_stream(device) if on_device else None
        copies.append(plugin.feed_ndarray(dense, copy, cuda_stream=stream))
    return copies


def build(
    source: Callable[[Any], Delivery],
    shape: Shape,
    *,
    batch: int,
    threads: int,
    readers: int,
    prefetch: int,
    device_id: int | None,
) -> Pipeline:
    """The pipeline, not yet started. device_id None places it on no GPU."""
    pipe: Pipeline = define(two_views, enable_conditionals=True)(
        source,
        shape,
        prefetch,
        True,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        py_num_workers=readers,
        py_start_method="spawn",
        seed=0,
    )
    return pipe


def run_once(delivery: Delivery, shape: Shape, threads: int = 1) -> tuple[Tensor, Tensor]:
    """Both views of one delivery, without reader processes: for pictures and tests, on the CPU."""
    pipe = define(two_views, enable_conditionals=True)(
        lambda _: delivery,
        shape,
        1,
        False,
        batch_size=len(delivery[0]),
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=1,
        seed=0,
    )
    im_q, im_k, _ = to_torch(pipe.run(), torch.device("cpu"))
    return im_q, im_k
