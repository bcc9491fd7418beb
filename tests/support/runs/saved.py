"""A checkpoint that is there when the call returns; `Saver` writes while training goes on."""

from __future__ import annotations

from typing import Any

from fastmoco.machine.collectives import gather_objects
from fastmoco.run.checkpoint import snapshot


def save(*where: Any, **what: Any) -> str:
    """On every rank why nothing was written, or an empty text; arguments as of `snapshot`."""
    found = snapshot(*where, **what)
    return gather_objects(found.write() if found else "", what["world"])[0]
