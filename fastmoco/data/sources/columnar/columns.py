"""Which column of a Parquet or Arrow file holds the images, and which one their labels.

Hubs write an image as struct{bytes, path} and say so in the metadata `huggingface`; other writers
use a plain binary column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastmoco.config import ConfigError

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "imagebytes")
_LABELS = ("label", "labels", "class", "category", "target", "y", "classname", "labelname", "wnid")


def image_column(schema: Any, path: str) -> str:
    """The name of the column of encoded images. Raises `ConfigError` for none, or several.

    schema: of pyarrow, as the file has it.
    """
    binary: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    said = [name for name in binary if _features(schema).get(name, {}).get("_type") == "Image"]
    named = [name for name in binary if _plain(name) in _IMAGES]
    for found in (said, named, binary):
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"{path} has several columns of images ({', '.join(found)}): keep one, or name "
                "it image."
            )
    raise ConfigError(
        f"{path} has no column of encoded images: its columns are {_listed(schema)}, and one must "
        "be binary, or a struct with a binary field bytes."
    )


def label_column(schema: Any, path: str) -> tuple[str, list[str]]:
    """The name of the column of labels, and the names of its classes if the file has them.

    Raises `ConfigError` for none, or several.
    """
    classes = {
        name: list(feature.get("names", []))
        for name, feature in _features(schema).items()
        if feature.get("_type") == "ClassLabel" and name in schema.names
    }
    found = list(classes) or [name for name in schema.names if _plain(name) in _LABELS]
    if len(found) != 1:
        several = f"several columns of labels ({', '.join(found)}): keep one"
        none = f"no column of labels ({_listed(schema)}): name it label"
        raise ConfigError(f"{path} has {several if found else none}.")
    return found[0], classes.get(found[0], [])


def numbered(labels: Sequence[Any], names: Sequence[str], path: str) -> tuple[list[int], list[str]]:
    """Labels as numbers of classes, and the class names. Raises `ConfigError` for a missing one.

    names: of the file, for labels that are numbers; without them the classes are the sorted labels,
    as of a list of images.
    """
    missing = (row for row, label in enumerate(labels) if label is None or (names and label == -1))
    if (row := next(missing, None)) is not None:
        raise ConfigError(f"{path} has no label in row {row}.")
    if names:
        if wrong := [label for label in labels if label not in range(len(names))]:
            raise ConfigError(f"{path} has label {wrong[0]}, but names of {len(names)} classes.")
        return list(labels), list(names)
    whole = all(re.fullmatch(r"-?\d+", str(label)) for label in set(labels))
    classes = sorted({str(label) for label in labels}, key=int if whole else str)
    number = {name: at for at, name in enumerate(classes)}
    return [number[str(label)] for label in labels], classes


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says about the columns; empty where it did not write the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _listed(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema) or "none"
