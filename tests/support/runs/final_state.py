"""What a run has ended with, to be compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint of a run directory, momentum included."""
    content = torch.load(folder / "latest.pth.tar", weights_only=True)
    tensors = dict(content["state_dict"])
    for index, buffers in content["optimizer"]["state"].items():
        tensors[f"momentum.{index}"] = buffers["momentum_buffer"]
    return tensors


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
