"""Labelled rows of Parquet and Arrow files, for kNN and linear evaluation."""

from __future__ import annotations

import glob
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.data.sources.listing import is_hidden
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables.arrow import arrow_batches, checked, open_arrow
from fastmoco.data.sources.tables.columns import (
    SUFFIXES,
    label_column,
    labels_of,
    pyarrow,
    reason,
    table_files,
)
from fastmoco.data.sources.tables.parquet import open_parquet, parquet_file


def is_table(root: str) -> bool:
    """Whether a root names Parquet or Arrow files, or a folder that holds some.

    A table beside class folders, such as `metadata.parquet`, describes them and is none.
    """
    return bool(table_suffix(root))


def table_suffix(root: str) -> str:
    """`.parquet` or `.arrow`; empty for what is no table."""
    place = Path(root)
    folders = [place, place / "data"]
    if place.is_dir():
        inside = {path.name for path in place.iterdir() if path.is_dir()}
        if any(name != "data" and not is_hidden(name) for name in inside):
            return ""
    for suffix in SUFFIXES:
        if place.is_dir():
            if any(next(folder.glob(f"*{suffix}"), None) for folder in folders):
                return suffix
        elif root.endswith(suffix) or (glob.has_magic(root) and glob.glob(root + suffix)):
            return suffix
    return ""


def labelled_table(root: str, max_pixels: int) -> tuple[Source, list[int], list[str]]:
    """The images, the label of each row, and the class names. Raises `ConfigError`."""
    parquet = table_suffix(root) == ".parquet"
    source = open_parquet(root, max_pixels) if parquet else open_arrow(root, max_pixels)
    return source, *labels_in(root, len(source.sizes))


def labels_in(root: str, images: int) -> tuple[list[int], list[str]]:
    """The label of each of so many rows, and the class names. Raises `ConfigError`."""
    suffix = table_suffix(root)
    values: list[object] = []
    found: dict[Path, list[str]] = {}
    for file in table_files(root, suffix):
        try:
            rows, found[file] = _labels(file, suffix)
        except (pyarrow("").ArrowException, OSError) as error:
            raise ConfigError(
                f"The labels of {file} cannot be read ({reason(error)}): fetch it again."
            ) from error
        first = next(iter(found))
        if found[file] != found[first]:
            raise ConfigError(
                f"{file} and {first} have other names of classes, or in another order: name the "
                "files of one data set."
            )
        values += rows
    if len(values) != images:
        raise ConfigError(f"{root} has {len(values)} labels for {images} images.")
    return labels_of(values, found[first], Path(root))


def _labels(file: Path, suffix: str) -> tuple[list[object], list[str]]:
    """The labels of the rows of a file, and the class names where it has them."""
    if suffix == ".parquet":
        table = parquet_file(file)
        column, names = label_column(table.schema_arrow, file)
        return table.read(columns=[column]).column(0).to_pylist(), names
    _, schema, batches = arrow_batches(file)
    column, names = label_column(schema, file)
    return [value for batch in batches for value in checked(batch, column).to_pylist()], names
