"""torchvision's decoder on a GPU (nvJPEG): whether it works here, and which pictures it refuses.

Its chroma is not interpolated and its inverse transform is another than libjpeg's, so its pixels
are a few levels off.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import io as torchvision_io

# Deprecated in torchvision 0.29.
_decode_jpeg: Any = getattr(torchvision_io, "decode_jpeg", None)
# Torch's own subclasses of RuntimeError: no picture causes them.
_NO_PICTURES = (torch.OutOfMemoryError, torch.AcceleratorError)
# torchvision raises RuntimeError only. nvJPEG's status 5 is memory that it did not get.
_NO_PICTURE_SAYS = re.compile(r"out of memory|CUDA error|CUDA stream: \d|: 5\b", re.IGNORECASE)
# Mean difference in levels from the CPU's decoder, of a smooth picture.
_SAME_PIXELS = 4.0


def decode_all(data: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Every JPEG as uint8 (3, H, W) RGB on the device. data: uint8 (bytes,) each, on the host.

    Raises `RuntimeError` if it refuses one. On CUDA, work that was queued on the current stream
    must be done: the decoder writes at once into memory that this work has freed but still reads
    (pytorch/vision pull request 9606).
    """
    mode = torchvision_io.ImageReadMode.RGB
    decoded: list[Tensor] = _decode_jpeg(list(data), mode, device=device)
    return decoded


def decode_or_refuse(data: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """As `decode_all`, but None for a picture that the decoder refuses.

    All at once; only where that fails by halves, so that a bad one costs few calls. Raises
    `RuntimeError` for a fault of the device: one of memory, or one that every picture meets.
    """
    try:
        return list(decode_all(data, device))
    except RuntimeError as error:
        _blame_a_picture(error)
        if len(data) == 1:
            return [None]
        found = _halves(data, device)
        if all(one is None for one in found):
            raise
        return found


def _halves(data: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    middle = len(data) // 2
    found: list[Tensor | None] = []
    for half in (data[:middle], data[middle:]):
        try:
            found += decode_all(half, device)
        except RuntimeError as error:
            _blame_a_picture(error)
            found += [None] if len(half) == 1 else _halves(half, device)
    return found


def _blame_a_picture(error: RuntimeError) -> None:
    """Raises the error again where it is the device's."""
    if isinstance(error, _NO_PICTURES) or _NO_PICTURE_SAYS.search(str(error)):
        raise error


@cache
def why_not(device: torch.device) -> str:
    """Why this device cannot decode, found by decoding a picture; empty if it can."""
    if device.type != "cuda":
        return "there is no NVIDIA GPU to decode on"
    if _decode_jpeg is None:
        return "this torchvision has no decoder for a GPU"
    data = _smooth_jpeg()
    try:
        found = decode_all([data], device)[0].cpu().float()
    except Exception as error:  # whatever the libraries raise is the finding
        return f"torchvision cannot decode on this GPU ({' '.join(str(error).split())[:200]})"
    expected = decode_all([data], torch.device("cpu"))[0].float()
    apart = float((found - expected).abs().mean()) if found.shape == expected.shape else 255.0
    if apart > _SAME_PIXELS:
        return f"nvJPEG's pixels are {apart:.1f} levels from the CPU's on this GPU"
    return ""


def _smooth_jpeg() -> Tensor:
    """A small JPEG whose colours change slowly, uint8 (bytes,)."""
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([2 * x, 3 * y, 255 - x - y], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
