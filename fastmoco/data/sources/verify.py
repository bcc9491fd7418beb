"""Decodes every sample once, before training, with all cores: `--data.verify true`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from functools import partial

from fastmoco.data.decode import BadImage
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import decode_sample
from fastmoco.data.sources.measure import CHUNK, in_order, in_parallel, progress
from fastmoco.data.sources.source import Source
from fastmoco.machine.cache import cache_folder, exclusive


def verify(source: Source, rule: PixelRule) -> dict[int, str]:
    """Reasons of the samples that do not decode completely, by number.

    The ranks of a machine share one scan; its result is kept as long as the index does not change.
    """
    digest = hashlib.sha256(f"{source.fingerprint()} {rule}".encode()).hexdigest()[:20]
    kept = cache_folder() / "verified" / f"{digest}.json"
    with exclusive(kept.with_suffix(".lock")):
        found = None
        with contextlib.suppress(OSError, ValueError):  # none yet, or half of one
            found = json.loads(kept.read_text())
        if found is None:
            found = _scan(source, rule)
            with contextlib.suppress(OSError):  # nowhere to keep it
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found))
    return {int(sample): reason for sample, reason in found.items()}


def _scan(source: Source, rule: PixelRule) -> dict[int, str]:
    total = len(source.sizes)
    chunks = (range(at, min(at + CHUNK, total)) for at in range(0, total, CHUNK))
    found: dict[int, str] = {}
    work = partial(_decode_all, source, rule)
    with in_parallel(many=total > 4 * CHUNK) as pool:
        decoded = in_order(pool, work, chunks)
        for _, bad in progress(decoded, lambda part: part[0], "verify", total):
            found.update(bad)
    return found


def _decode_all(
    source: Source, rule: PixelRule, samples: Sequence[int]
) -> tuple[int, dict[int, str]]:
    """How many were decoded, and the reasons of those that could not be."""
    bad: dict[int, str] = {}
    for sample in samples:
        try:
            decode_sample(source, sample, rule)
        except BadImage as error:
            bad[sample] = str(error)
    return len(samples), bad
