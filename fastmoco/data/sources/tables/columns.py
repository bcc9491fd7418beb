"""Files of a table, its column of images and its column of labels.

A column of images is `struct<bytes, path>`, as `datasets` writes it, or plain binary. Where several
may be meant, the only `Image` of `datasets` counts, else the one with such a name (`image`, `img`,
`picture`, `photo`, ...), else they are refused. The column of labels is the only `ClassLabel` of
`datasets`, else it is found by its name, as in lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching
from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources.image_list import LABELS, numbered, plain
from fastmoco.data.sources.listing import Passed, starts_like_image, walk
from fastmoco.data.sources.measure import HEAD
from fastmoco.data.sources.splits import require_one_split

SUFFIXES = (".parquet", ".arrow")
_IMAGES = frozenset({"image", "img", "picture", "photo", "jpg", "jpeg", "png", "imagebytes"})
NULL = "null instead of an image"


class Column(NamedTuple):
    """Where the encoded images are: a column of bytes, or the field `bytes` of one."""

    name: str
    inner: str

    @property
    def path(self) -> str:
        """As Parquet names it."""
        return f"{self.name}.{self.inner}" if self.inner else self.name


def pyarrow(module: str) -> Any:
    """A module of pyarrow. Raises `ConfigError` where that is not installed."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet and Arrow files are read by pyarrow: pip install 'fastmoco[parquet]'."
        ) from error
    return {"": pyarrow, "ipc": pyarrow.ipc, "parquet": pyarrow.parquet}[module]


def table_files(root: str, suffix: str) -> list[Path]:
    """The files of a table below a folder or of a pattern, sorted.

    Of a folder of `save_to_disk` those that its `state.json` names: others are caches. Raises
    `ConfigError` for none, and for files of several splits.
    """
    if not root:
        raise ConfigError(f"data.root is not set: name a {suffix} file, or a folder of them.")
    found: list[Path] = []
    for place in map(Path, matching(root)):
        if not place.exists():
            raise ConfigError(f"data.root {place} does not exist.")
        found += _below(place, suffix) if place.is_dir() else [place]
    if not found:
        raise ConfigError(f"data.root {root} holds no {suffix} file.")
    require_one_split(root, [str(path) for path in found])
    return found


def _below(folder: Path, suffix: str) -> list[Path]:
    try:
        listed = list(walk(str(folder), Passed(), counts=lambda name: name.endswith(suffix)))
    except OSError as error:
        raise ConfigError(
            f"data.root: the folder {error.filename} cannot be listed: {error.strerror}."
        ) from error
    found: list[Path] = []
    for inner, _, names in listed:
        state = folder / inner / "state.json"
        if names and suffix == ".arrow" and state.is_file():
            try:
                rows = json.loads(state.read_text())["_data_files"]
                names = [os.path.basename(row["filename"]) for row in rows]
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise ConfigError(f"{state} does not name the files of a data set.") from error
        found += [folder / inner / name for name in names]
    return found


def image_column(schema: Any, file: Path) -> Column:
    """The column of images, the only `Image` of `datasets` where it wrote the file.

    Raises `ConfigError` for none and for several.
    """
    types = pyarrow("").types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found, names = list[Column](), _names(schema, file)
    for field in schema:
        if is_bytes(field.type):
            found.append(Column(field.name, ""))
        elif types.is_struct(field.type):
            kinds = (child.type for child in field.type)
            inner = dict(zip(_names(field.type, file), kinds, strict=True))
            if "bytes" in inner and is_bytes(inner["bytes"]):
                found.append(Column(field.name, "bytes"))
    images = {n for n, one in _features(schema).items() if one.get("_type") == "Image"}
    named = [column for column in found if column.name in images]
    named = named or [column for column in found if plain(column.name) in _IMAGES]
    if len(named) == 1 or len(found) == 1:
        return named[0] if len(named) == 1 else found[0]
    if found:
        several = ", ".join(column.name for column in named or found)
        raise ConfigError(f"{file} has several columns of images ({several}): keep one of them.")
    raise ConfigError(
        f"{file} has no column of images (binary, or a struct with bytes) among {', '.join(names)}."
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` says of each column; empty for a file that something else wrote."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _names(fields: Any, file: Path) -> list[str]:
    """The names of fields. Raises `ConfigError` for one that is no text."""
    try:
        return [field.name for field in fields]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} has a column whose name is no text: fetch it again.") from error


def label_column(schema: Any, file: Path) -> tuple[str, list[str]]:
    """The column of labels, and the names of its classes where `datasets` keeps these.

    Raises `ConfigError` for none and for several.
    """
    classes = {
        name: [str(label) for label in names] if isinstance(names, list) else []
        for name, feature in _features(schema).items()
        if feature.get("_type") == "ClassLabel"
        for names in [feature.get("names")]
    }
    columns = _names(schema, file)
    found = [n for n in classes if n in columns] or [n for n in columns if plain(n) in LABELS]
    if len(found) == 1:
        return found[0], classes.get(found[0], [])
    several = f"has several columns of labels ({', '.join(found)}): keep one of them"
    raise ConfigError(f"{file} {several if found else 'has no column of labels, such as label'}.")


def labels_of(
    values: Sequence[object], names: list[str], file: Path
) -> tuple[list[int], list[str]]:
    """Numbers of the labels and names of the classes. Raises `ConfigError` for a row without."""
    for row, value in enumerate(values):
        if value is None or (names and not (isinstance(value, int) and 0 <= value < len(names))):
            raise ConfigError(f"{file}: the label of row {row} is {value}, which names no class.")
    if names:
        return [int(str(value)) for value in values], names
    return numbered([str(value) for value in values])


class Measured:
    """What the bytes of images say, a value of a column after the other."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels, self._found = max_pixels, list[tuple[int, int]]()
        self.lengths: list[int] = []
        self.bad: dict[int, str] = {}

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(n, 2): width and height; 0 where an image is bad."""
        return np.array(self._found, np.int32).reshape(-1, 2)

    def add(self, values: Any) -> None:
        """Measure an array of encoded images."""
        for value in values:
            data = memoryview(value.as_buffer()) if value.is_valid else None
            self.lengths.append(len(data or b""))
            try:
                size = _size_of(data, self._max_pixels)
            except BadImage as error:
                self.bad[len(self._found)], size = str(error), (0, 0)
            self._found.append(size)


def _size_of(data: memoryview | None, max_pixels: int) -> tuple[int, int]:
    """Width and height of encoded bytes. Raises `BadImage`."""
    if data is None:
        raise BadImage(NULL)
    head = bytes(data[:HEAD])
    try:
        return image_size(head, max_pixels)
    except BadImage:
        if len(data) <= HEAD or not starts_like_image(head):
            raise
        return image_size(bytes(data), max_pixels)


def reason(error: BaseException) -> str:
    """The first line of what pyarrow or the system says."""
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")[:200]


def encoded(array: Any, column: Column) -> Any:
    """The array of bytes in an array of the column; no values are copied."""
    if not column.inner:
        return array
    return array.flatten()[[field.name for field in array.type].index(column.inner)]
