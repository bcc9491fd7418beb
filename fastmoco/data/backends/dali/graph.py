"""DALI decodes and crops: one definition for the CPU and for the GPU. The only importer of DALI.

Decoding is exact against PIL, the crop but for its resize, which differs by rounding. All else is
`fastmoco_kernels.photometric`, whose rows pass through beside the crops.

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
    from nvidia.dali import types as dali_types
    from nvidia.dali.pipeline import Pipeline, pipeline_def
    from nvidia.dali.plugin import pytorch as dali_pytorch
except ImportError:  # every module of fastmoco can be imported without DALI
    fn = dali_types = dali_pytorch = None  # type: ignore[assignment]
    pipeline_def = Pipeline = None  # type: ignore[assignment, misc]

from fastmoco.data.photometric_rows import BOX
from fastmoco_kernels import photometric

Node = Any
Delivery = tuple[list[NDArray[Any]], ...]

types: Any = dali_types  # its constants are added at import, unseen by type checkers
plugin: Any = dali_pytorch
define: Any = pipeline_def
# Torch's own subclasses of RuntimeError: no image causes them.
NOT_DALI = (torch.OutOfMemoryError, torch.AcceleratorError)


@dataclass(frozen=True)
class Shape:
    """What the definition depends on besides the rows."""

    side: int
    """S."""
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
    box = fn.cast(row[BOX], dtype=types.INT32)
    cut = fn.slice(image, start=box[0:2], shape=box[2:4], axes=(0, 1))
    return fn.resize(
        cut, size=[side, side], mag_filter=types.INTERP_LINEAR, min_filter=types.INTERP_TRIANGULAR
    )


def view_of(image: Node, row: Node, shape: Shape) -> tuple[Node, Node]:
    """The crop of an image, uint8 (S, S, 3), and its row, both where the views are finished."""
    return crop(image, row, shape.side), row.gpu() if shape.device == "gpu" else row


def two_views(
    source: Callable[[Any], Delivery], shape: Shape, prefetch: int, parallel: bool
) -> Any:
    """Crops and rows of the queries, and of the keys unless `one_view`, and `replaced`."""
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
        return *view_of(decode(data, shape.device), row_q, shape), replaced
    data, row_q, row_k, replaced = inputs[:4]
    image_q = decode(data, shape.device)
    image_k = decode(inputs[4], shape.device) if shape.two_decodes else image_q
    return *view_of(image_q, row_q, shape), *view_of(image_k, row_k, shape), replaced


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


def to_torch(outputs: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The finished views, queries before keys, uint8 (n or 2n, S, S, 3), and `replaced`."""
    *views, replaced = outputs
    crops, rows = (_copied(views[k::2], device) for k in (0, 1))
    return photometric(crops, rows), _copied([replaced], torch.device("cpu"))


def _copied(outputs: list[Any], device: torch.device) -> Tensor:
    """One copy of DALI's outputs, which it reuses; on a GPU ordered with the current stream."""
    dense = [output.as_tensor() for output in outputs]
    dtype = {types.UINT8: torch.uint8, types.FLOAT: torch.float32, types.INT64: torch.int64}
    rows, *sizes = dense[0].shape()
    copy = torch.empty(len(dense) * rows, *sizes, dtype=dtype[dense[0].dtype], device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    for part, target in zip(dense, copy.split(rows), strict=True):
        plugin.feed_ndarray(part, target, cuda_stream=stream)
    return copy


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
    pipe: Pipeline = define(two_views)(
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
    pipe = define(two_views)(
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
    im_q, im_k = to_torch(pipe.run(), torch.device("cpu"))[0].chunk(2)
    return im_q, im_k
