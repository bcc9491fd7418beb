"""What each improvement is worth: `python -m bench.ablation --config FILE [dotted overrides]`.

Our step with one improvement switched off at a time, with all of them off, and the published step.
Every variant is a process of its own, and all take turns (`bench.measure.contest`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.measure import nvml
from bench.measure.contest import Contestant, Result, contest
from bench.measure.program import Options, command, complain, parser, progress
from bench.measure.rows import Row, case_of, device_of, quantiles
from bench.steps.switches import switches
from bench.throughput import summary
from fastmoco.config import Config, dump, parse
from fastmoco.method.build import compile_encoders

OURS, ALL_OFF, PUBLISHED = "nothing", "all of these", "published step"


@dataclass(frozen=True)
class Variant:
    """One way to run the step: a factory in `contestants.py` and how it differs from ours."""

    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    factory: str = "our_step"


def variants(config: Config) -> dict[str, Variant]:
    """The variants by name; the one that others are relative to is `OURS`."""
    device = device_of(config)
    found = switches(config, device.type == "cuda", compile_encoders(config, device))
    single = {f"{s.name} ({s.instead} instead)": Variant(s.overrides, s.without) for s in found}
    all_off = Variant(
        tuple(word for s in found for word in s.overrides),
        tuple(word for s in found for word in s.without),
    )
    published = Variant(factory="official_step")
    return {OURS: Variant(), **single, ALL_OFF: all_off, PUBLISHED: published}


def relative(results: Mapping[str, Result], name: str) -> tuple[list[float], float]:
    """p20, p50, p80 over turns of the time of a step, and its processor time, to those of OURS."""
    mine, whole = results[name].windows, results[OURS].windows
    turns = [a.seconds / b.seconds for a, b in zip(mine, whole, strict=True)]
    busy = sum(w.cpu_seconds for w in mine) / sum(w.cpu_seconds for w in whole)
    return quantiles(turns), round(busy, 4)


def rows_of(results: Mapping[str, Result], case: Row) -> list[Row]:
    """One row per variant."""
    rows = []
    for name, result in results.items():
        times, busy = relative(results, name)
        rows.append(
            {
                "benchmark": "ablation",
                "case": case | {"part": "switches"},
                "contestant": name,
                "relative": times,
                "relative_cpu": busy,
                "step_ms": quantiles([1e3 * w.seconds / w.steps for w in result.windows], 3),
                **summary(result, case["batch"]),
            }
        )
    return rows


def measure(own: Options) -> dict[str, Result]:
    """The contest of all variants."""
    contestants = []
    for name, variant in variants(own.config).items():
        given: dict[str, Any] = {"config": dump(parse([*own.rest, *variant.overrides]))}
        if variant.without:
            given["without"] = variant.without
        contestants.append(Contestant(name, f"bench.steps.contestants:{variant.factory}", given))
    return contest(
        contestants,
        windows=own.windows,
        steps=own.steps,
        warmup=max(2, own.steps),
        meter=nvml.build_meter(own.device, partial(complain, "ablation")),
        progress=progress(own.windows),
    )


@command(parser("ablation", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """One row per variant."""
    yield rows_of(measure(own), case_of(own.config))


if __name__ == "__main__":
    sys.exit(main())
