"""The source of images that the configuration names, and its folders in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastmoco.config import Config, ConfigError, DataConfig
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.sources.image_list import open_list
from fastmoco.data.sources.shards import open_shards
from fastmoco.data.sources.source import Source

OPEN: dict[str, Callable[[DataConfig], Source]] = {
    "folder": lambda data: open_folder(data.root, data.max_pixels, any_name=data.any_name),
    "list": lambda data: open_list(data.root, data.max_pixels),
    "shards": lambda data: open_shards(data.root, data.max_pixels),
}


def open_source(config: Config) -> Source:
    """The source of a configuration that `resolve_folders` has returned. Raises `ConfigError`."""
    data = config.data
    if data.source not in OPEN:
        raise ConfigError(f"data.source {data.source} has no files to read.")
    return OPEN[data.source](data)


def resolve_folders(config: Config) -> Config:
    """The same run with every folder spelled out: the only place that does so, once per run.

    `data.root` becomes its `train` subfolder where there is one (the ImageNet convention), the kNN
    bank defaults to the training images and the kNN test set to `test` or `val` beside `train`.
    The demo source is rendered on first use and becomes a folder like any other.

    Raises `ConfigError` if the kNN monitor is on and no labelled test folder is found.
    """
    if config.data.source == "demo":
        # Imported on demand: rendering is needed on the first use only.
        from fastmoco.data.sources.demo import ensure_demo

        demo = ensure_demo()
        data = replace(config.data, source="folder", root=str(demo.train))
        knn = replace(config.knn, train_root=str(demo.train), test_root=str(demo.test))
        return replace(config, data=data, knn=knn)
    if config.data.source == "synthetic":
        if config.knn.every and not (config.knn.train_root and config.knn.test_root):
            raise ConfigError(
                "The synthetic source has no labels for the kNN monitor: set knn.every to 0, "
                "or name knn.train_root and knn.test_root."
            )
        return config
    root = Path(config.data.root)
    train = root / "train" if (root / "train").is_dir() else root
    test = config.knn.test_root or next(
        (str(root / name) for name in ("test", "val") if (root / name).is_dir()), ""
    )
    if config.knn.every and not test:
        raise ConfigError(
            f"knn.every is {config.knn.every} but there is neither a test nor a val folder in "
            f"{config.data.root or 'data.root'}: name class folders in knn.test_root, "
            "or set knn.every to 0."
        )
    data = replace(config.data, root=str(train) if config.data.root else "")
    knn = replace(config.knn, train_root=config.knn.train_root or str(train), test_root=test)
    return replace(config, data=data, knn=knn)
