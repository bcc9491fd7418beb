"""Is a file what was written? A digest per tensor, and one for everything else in it.

A checkpoint of ours carries them. A file without them, of an older version or of another program,
has at least the CRC that `torch.save` puts beside every record and `torch.load` never looks at.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "fastmoco"
CHECKSUMS = "checksums"
"""Where a checkpoint has its checksums: `content["fastmoco"]["checksums"]`."""
_REST = ""
_NAMED = 3


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested dictionaries and lists, by its dotted name, in order."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def checksums(content: Mapping[str, Any]) -> dict[str, str]:
    """A digest for each tensor by its dotted name, and one for all that is no tensor."""
    found: dict[str, str] = {}
    rest = hashlib.sha256()
    for name, value in leaves(_without_checksums(content)):
        if isinstance(value, Tensor):
            found[name] = _digest(value)
        else:
            rest.update(f"{name}={value!r}\n".encode())
    return {**found, _REST: rest.hexdigest()[:16]}


def _without_checksums(content: Mapping[str, Any]) -> dict[str, Any]:
    ours = content.get(OURS)
    if not isinstance(ours, Mapping):
        return dict(content)
    return {**content, OURS: {n: value for n, value in ours.items() if n != CHECKSUMS}}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(data.data)
    return digest.hexdigest()[:16]


def damage(path: Path, content: Mapping[str, Any]) -> str:
    """What differs from the checksums in the file, as a clause; empty where nothing does."""
    ours = content.get(OURS)
    given = ours.get(CHECKSUMS) if isinstance(ours, Mapping) else None
    if given is None:
        return _damaged_record(path)
    if not isinstance(given, Mapping):
        return "its checksums are no table"
    now = checksums(content)
    wrong = [
        name or "its settings" for name in {**now, **given} if now.get(name) != given.get(name)
    ]
    return f"the checksum is wrong of {first(wrong)}" if wrong else ""


def _damaged_record(path: Path) -> str:
    """The same by the CRCs of the zip that `torch.save` writes. Older formats have none."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    return f"the checksum is wrong of {broken}" if broken else ""


def not_finite(content: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that hold an infinite value or NaN."""
    return [n for n, t in leaves(content) if isinstance(t, Tensor) and not is_finite(t)]


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is; one pass that allocates nothing. NaN passes through `aminmax`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def first(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
