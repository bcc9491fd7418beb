"""`torch.hub.load(REPOSITORY, "encoder", path=FILE)`: any weights that fastmoco can read."""

import sys
from pathlib import Path

import torch

dependencies = ["torch", "torchvision", "safetensors", "jsonargparse", "yaml"]

# torch.hub puts this folder on the path; the kernels' package lies one deeper.
sys.path.append(str(Path(__file__).resolve().parent / "kernels"))


def encoder(path: str) -> torch.nn.Module:
    """The frozen trunk in a file, run or hub folder: images (N, 3, S, S) to features (N, D).

    Images are RGB in [0, 1], normalized with ImageNet's mean and standard deviation. The module is
    in evaluation mode. Raises `fastmoco.config.ConfigError`, in one sentence, for other files.
    """
    from fastmoco.weights.read import load_encoder

    return load_encoder(path)
