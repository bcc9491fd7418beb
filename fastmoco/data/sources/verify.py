"""Decodes every sample once, before training, with all cores: `--data.verify true`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial

from fastmoco.data.decode import BadImage
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import decode_sample
from fastmoco.data.sources.measure import CHUNK, in_order, in_parallel, progress
from fastmoco.data.sources.source import Source
from fastmoco.machine.cache import cache_folder, exclusive

Known = dict[int, tuple[str, list[int]]]
"""Reason by sample, and the stamp of its file when that was found."""


def verify(source: Source, rule: PixelRule) -> dict[int, str]:
    """Reasons of the samples that do not decode completely, by number.

    The ranks of a machine share one scan; its result is kept as long as the index does not change,
    except that files which were bad and have changed since are decoded again.
    """
    digest = hashlib.sha256(f"{source.fingerprint()} {rule}".encode()).hexdigest()[:20]
    kept = cache_folder() / "verified" / f"{digest}.stamped.json"
    with exclusive(kept.with_suffix(".lock")):
        known: Known | None = None
        broken = ValueError, TypeError, AttributeError, RecursionError
        with contextlib.suppress(OSError, *broken):  # none yet, or half of one
            rows = json.loads(kept.read_text())
            known = {int(n): (str(reason), list(stamp)) for n, (reason, stamp) in rows.items()}
            if not all(0 <= n < len(source.sizes) for n in known):
                known = None
        samples: Sequence[int] = range(len(source.sizes))
        if known is not None:
            samples = [n for n, (_, stamp) in known.items() if source.stamp(n) != stamp]
        if known is None or samples:
            stays = {n: row for n, row in (known or {}).items() if n not in set(samples)}
            known = {**stays, **_scan(source, rule, samples)}
            with contextlib.suppress(OSError):  # nowhere to keep it
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(known))
    return {sample: reason for sample, (reason, _) in known.items()}


def _scan(source: Source, rule: PixelRule, samples: Sequence[int]) -> Known:
    total = len(samples)
    chunks = (samples[at : at + CHUNK] for at in range(0, total, CHUNK))
    found: dict[int, str] = {}
    began = time.time_ns()
    work = partial(_decode_all, source, rule)
    with in_parallel(many=total > 4 * CHUNK) as pool:
        decoded = in_order(pool, work, chunks)
        for _, bad in progress(decoded, lambda part: part[0], "verify", total):
            found.update(bad)
    stamps = {sample: source.stamp(sample) for sample in found}
    # What has changed since the scan began will be looked at again.
    return {n: (why, stamps[n] if stamps[n][1:] < [began] else []) for n, why in found.items()}


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
