"""fastmoco: Momentum Contrast (MoCo v1 and v2) pre-training, exact, fast and honest.

In Python, here on noise so that it takes seconds:

    >>> import fastmoco, torch
    >>> from fastmoco.config import AugmentConfig, DataConfig, ModelConfig, MocoConfig
    >>> from fastmoco.config import OptimConfig, RunConfig
    >>> config = fastmoco.Config(
    ...     run=RunConfig(dir="runs/noise", device="cpu", max_steps=2),
    ...     data=DataConfig(source="synthetic", synthetic_samples=16),
    ...     augment=AugmentConfig(image_size=32),
    ...     model=ModelConfig(arch="resnet18"),
    ...     moco=MocoConfig(queue_size=64, bn_group_size=2),
    ...     optim=OptimConfig(global_batch_size=8),
    ... )
    >>> trained = fastmoco.train(config)  # doctest: +ELLIPSIS
    host ...
    >>> trained.folder.name, trained.metrics["step"], trained.finished
    ('noise', 2, True)
    >>> encoder = fastmoco.load_encoder(trained.folder)
    >>> encoder(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 512])

Importing it is quick: what a name needs is imported when the name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmoco.api import train
    from fastmoco.config import Config
    from fastmoco.weights.read import load_encoder

import fastmoco.machine.environment  # noqa: F401  # before anything loads torch

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load_encoder", "train"]

_HOMES = {"Config": "fastmoco.config", "load_encoder": "fastmoco.weights.read"}


def __getattr__(name: str) -> Any:
    if name == "train":
        # The module: an import of it puts it here under this name, so it can be called itself.
        return import_module("fastmoco.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmoco' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
