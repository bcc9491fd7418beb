"""A decoder of JPEGs that gives some up, in the place of a GPU's, and pictures for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco.data.backends.nvjpeg.decoder import decode_all
from tests.support.data.hostile import jpeg


def bytes_of(one: Tensor) -> bytes:
    return one.numpy().tobytes()


class Refusing:
    """A decoder that gives up a list with one of some pictures in it, and counts its calls."""

    def __init__(self, refused: Sequence[bytes], says: str = "Failed to decode batch: 3") -> None:
        self.refused, self.says, self.calls = set(refused), says, 0

    def __call__(self, data: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        self.calls += 1
        if any(bytes_of(one) in self.refused for one in data):
            raise RuntimeError(f"Error while decoding JPEG images: {self.says}")
        return decode_all(data, device)


def encoded(count: int) -> list[Tensor]:
    made = [jpeg(quality=40 + number) for number in range(count)]
    return [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in made]
