"""What each improvement is worth: `python -m bench.ablation --config FILE [dotted overrides]`.

`switches` is our step with one improvement switched off at a time. `waterfall` goes from the
published step to ours: first the same algorithm as this program runs it with everything off, then
one improvement after another, so gains add up and depend on the order. --only takes one of them.
Every variant is a process of its own, and those of a part take turns (`bench.measure.contest`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.measure import nvml
from bench.measure.contest import Contestant, Result, contest
from bench.measure.program import chosen, command, complain, configured, parser, progress, steps_of
from bench.measure.rows import Row, append_rows, case_of, device_of, origin, quantiles
from bench.steps.switches import Switch, switches
from bench.throughput import summary
from fastmoco.config import Config, dump, parse
from fastmoco.method.build import compile_encoders

EVERYTHING = "nothing"
PUBLISHED, PLAIN = "published step", "this program, all off"
PARTS = ("switches", "waterfall")


@dataclass(frozen=True)
class Variant:
    """One way to run the step: a factory in `contestants.py` and how it differs from ours."""

    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    factory: str = "our_step"


def improvements(config: Config) -> list[Switch]:
    """What can be switched off here, in the order of the waterfall."""
    device = device_of(config)
    return switches(config, device.type == "cuda", compile_encoders(config, device))


def variants(part: str, config: Config) -> dict[str, Variant]:
    """The variants of a part by name; the one that others are relative to is `EVERYTHING`."""
    found, ours = improvements(config), {EVERYTHING: Variant()}
    if part == "switches":
        return ours | {
            f"{s.name} ({s.instead} instead)": Variant(s.overrides, s.without) for s in found
        }
    names = [PLAIN, *(s.name for s in found[:-1])]
    steps = {
        name: Variant(
            tuple(word for s in found[done:] for word in s.overrides),
            tuple(word for s in found[done:] for word in s.without),
        )
        for done, name in enumerate(names)
    }
    return {PUBLISHED: Variant(factory="official_step"), **steps} | ours


def relative(results: Mapping[str, Result], name: str) -> tuple[list[float], float]:
    """p20, p50, p80 over turns of the time of a step, and its processor time, to EVERYTHING's."""
    mine, whole = results[name].windows, results[EVERYTHING].windows
    turns = [a.seconds / b.seconds for a, b in zip(mine, whole, strict=True)]
    busy = sum(w.cpu_seconds for w in mine) / sum(w.cpu_seconds for w in whole)
    return quantiles(turns), round(busy, 4)


def rows_of(results: Mapping[str, Result], shared: Mapping[str, Any]) -> list[Row]:
    """One row per variant, in the order of the part."""
    rows = []
    for name, result in results.items():
        times, busy = relative(results, name)
        step_ms = [1e3 * w.seconds / w.steps for w in result.windows]
        rows.append(
            {
                **shared,
                "contestant": name,
                "relative": times,
                "relative_cpu": busy,
                "step_ms": quantiles(step_ms, 3),
                **summary(result, shared["case"]["batch"]),
            }
        )
    return rows


def run_part(part: str, arguments: Sequence[str], windows: int, steps: int) -> dict[str, Result]:
    """The contest of one part; `arguments` give the configuration."""
    config = parse(arguments)
    contestants = []
    for name, variant in variants(part, config).items():
        given: dict[str, Any] = {"config": dump(parse([*arguments, *variant.overrides]))}
        if variant.without:
            given["without"] = variant.without
        contestants.append(Contestant(name, f"bench.steps.contestants:{variant.factory}", given))
    return contest(
        contestants,
        windows=windows,
        steps=steps,
        warmup=max(2, steps),
        meter=nvml.build_meter(device_of(config), partial(complain, "ablation")),
        progress=progress(windows),
    )


@command("ablation")
def main(arguments: Sequence[str]) -> None:
    """Print a table per part."""
    own, config, rest = configured(parser("ablation", __doc__), arguments)
    parts, device = chosen(own.only, PARTS), device_of(config)
    where = origin(device, own.publish)
    for part in parts:
        results = run_part(part, rest, own.windows, steps_of(own.steps, device))
        shared: dict[str, Any] = {"benchmark": "ablation", "case": case_of(config) | {"part": part}}
        if part == "waterfall":
            shared["order"] = [switch.name for switch in improvements(config)]
        rows = rows_of(results, shared)
        print(f"{part}: p50 (p20 - p80) over {own.windows} turns")
        for row in rows:
            p20, p50, p80 = row["relative"]
            print(
                f"{row['contestant']:46s}{row['step_ms'][1]:10.1f} ms  {p50:.2f} of ours "
                f"({p20:.2f} - {p80:.2f}), CPU time {row['relative_cpu']:.2f}",
                flush=True,
            )
        if own.publish:
            append_rows("ablation", rows, where)


if __name__ == "__main__":
    sys.exit(main())
