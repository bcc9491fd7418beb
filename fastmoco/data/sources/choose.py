"""The source of images that the configuration names, and its folders in full."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastmoco.config import Config, ConfigError, DataConfig
from fastmoco.config.paths import spelled_out
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.sources.image_list import open_list
from fastmoco.data.sources.remote.source import open_remote
from fastmoco.data.sources.remote.store import is_remote
from fastmoco.data.sources.shards import open_shards
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables.arrow import open_arrow
from fastmoco.data.sources.tables.parquet import open_parquet

OPEN: dict[str, Callable[[DataConfig], Source]] = {
    "folder": lambda data: open_folder(
        data.root, data.max_pixels, any_name=data.any_name, rescan=data.rescan
    ),
    "list": lambda data: open_list(data.root, data.max_pixels, rescan=data.rescan),
    "shards": lambda data: open_shards(
        data.root, data.max_pixels, any_name=data.any_name, rescan=data.rescan
    ),
    "parquet": lambda data: open_parquet(
        data.root, data.max_pixels, shuffle_window=data.shuffle_window, rescan=data.rescan
    ),
    "arrow": lambda data: open_arrow(data.root, data.max_pixels, rescan=data.rescan),
}


def open_source(config: Config) -> Source:
    """The source of a configuration that `resolve_folders` has returned. Raises `ConfigError`."""
    data = config.data
    if data.source not in OPEN:
        raise ConfigError(f"data.source {data.source} has no files to read.")
    if is_remote(data.root):
        return open_remote(data)
    return OPEN[data.source](data)


_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")


def resolve_folders(config: Config) -> Config:
    """The same run with every folder spelled out: the only place that does so, once per run.

    A folder `train` or `training`, in any case, is a split only beside one called test, testing,
    val, valid or validation, or beside `knn.test_root`: then `data.root` becomes it, and the kNN
    test set is the first of those. Else it is a class like any other. The kNN bank defaults to the
    training images. The demo source is rendered on first use and becomes a folder like any other.

    Raises `ConfigError` if the kNN monitor is on and no labelled test folder is found, for two
    training folders, and for a variable in a path that is not set.
    """
    config = _without_variables(config)
    if config.data.source == "demo":
        # Imported on demand: rendering is needed on the first use only.
        from fastmoco.data.sources.demo import ensure_demo

        demo = ensure_demo()
        data = replace(config.data, source="folder", root=str(demo.train))
        knn = replace(config.knn, train_root=str(demo.train), test_root=str(demo.test))
        return replace(config, data=data, knn=knn)
    if config.data.source == "synthetic" or is_remote(config.data.root):
        if config.knn.every and not (config.knn.train_root and config.knn.test_root):
            raise ConfigError(
                "The synthetic source and buckets have no labels for the kNN monitor: set "
                "knn.every to 0, or name local images in knn.train_root and knn.test_root."
            )
        return config
    root = Path(config.data.root)
    train, found = _split(root, config.knn.test_root)
    test = config.knn.test_root or str(found or "")
    if config.knn.every and not test:
        raise ConfigError(
            f"knn.every is {config.knn.every} but there is neither a test nor a val folder in "
            f"{config.data.root or 'data.root'}: name class folders in knn.test_root, "
            "or set knn.every to 0."
        )
    data = replace(config.data, root=str(train) if config.data.root else "")
    knn = replace(config.knn, train_root=config.knn.train_root or str(train), test_root=test)
    return replace(config, data=data, knn=knn)


def _without_variables(config: Config) -> Config:
    run, data, model, knn = config.run, config.data, config.model, config.knn
    return replace(
        config,
        run=replace(run, dir=spelled_out(run.dir), resume=spelled_out(run.resume)),
        data=replace(data, root=spelled_out(data.root)),
        model=replace(model, init_from=spelled_out(model.init_from)),
        knn=replace(
            knn, train_root=spelled_out(knn.train_root), test_root=spelled_out(knn.test_root)
        ),
    )


def _named(root: Path, names: Sequence[str]) -> list[Path]:
    """Folders in root that have one of these names in any case, in the order of the names."""
    try:
        inside = [path for path in root.iterdir() if path.name.lower() in names and path.is_dir()]
    except OSError:
        return []
    return sorted(inside, key=lambda path: (names.index(path.name.lower()), path.name))


def _split(root: Path, test_root: str) -> tuple[Path, Path | None]:
    """The folder of the training images, and the one of labelled test images if there is one."""
    trains, tests = _named(root, _TRAIN), _named(root, _TEST)
    # Not `Path.resolve`, for which a link in a circle is a RuntimeError.
    beside = bool(test_root) and Path(os.path.realpath(test_root)).parent == Path(
        os.path.realpath(root)
    )
    if trains and (tests or beside):
        if len(trains) > 1:
            both = " and ".join(path.name for path in trains)
            raise ConfigError(f"{root} holds {both}: name the training images in data.root.")
        return trains[0], tests[0] if tests else None
    if not tests and root.name.lower() in _TRAIN:  # the split itself was named
        tests = _named(root.parent, _TEST)
    return root, tests[0] if tests else None


def recognized(config: Config) -> list[str]:
    """What `resolve_folders` made of the names of folders, one sentence each."""
    if config.data.source in ("demo", "synthetic") or not config.data.root:
        return []
    root, found = Path(config.data.root), list[str]()
    if root.name.lower() in _TRAIN and (tests := _named(root.parent, _TEST)):
        named = ", ".join(f"{path.name}/" for path in tests)
        found.append(f"{root.name}/ is the split to train on, beside {named}")
    found += [
        f"{path.name}/ counts as a class, as no test or val folder is beside it"
        for path in _named(root, _TRAIN)
    ]
    if config.knn.every:
        found.append(f"kNN bank {config.knn.train_root}, test {config.knn.test_root}")
    return found


def shared_images(config: Config) -> list[str]:
    """A warning where the kNN test images lie in the folder of the training images."""
    if not (config.knn.every and config.data.root and config.knn.test_root):
        return []
    places = (config.knn.test_root, config.data.root)
    test, root = (Path(os.path.realpath(place)) for place in places)
    if not test.is_relative_to(root):
        return []
    return [
        f"The kNN test images {config.knn.test_root} lie in data.root and are trained on as well: "
        "move the training images to a folder train beside them."
    ]
