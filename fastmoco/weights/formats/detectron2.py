"""Weights for Detectron2, in the pickle and under the names that the official converter writes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np

from fastmoco.config import ConfigError
from fastmoco.weights.files import write
from fastmoco.weights.read import Weights


def detectron2_name(name: str) -> str:
    """torchvision's name in Detectron2's words: `layer1.0.bn2.weight`, `res2.0.conv2.norm.weight`.

    What belongs to no stage is the stem's, the projection head as well, which Detectron2 ignores.
    """
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def write_detectron2(weights: Weights, path: Path) -> None:
    """Pickle `{"model": {name: array}, "__author__": "MOCO", "matching_heuristics": True}`.

    Raises `ConfigError` for the cifar stem, which Detectron2's ResNets do not have.
    """
    if weights.architecture.stem == "cifar":
        raise ConfigError(
            f"{weights.path} has the cifar stem, and Detectron2's ResNets start with a 7x7 "
            "convolution: export a run with model.stem imagenet."
        )
    state = {**weights.trunk, **weights.head}
    arrays: dict[str, np.ndarray] = {detectron2_name(n): t.numpy() for n, t in state.items()}
    content = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    write(path, lambda partial: partial.write_bytes(pickle.dumps(content)))
