"""What each improvement is worth: `python -m bench.ablation --config FILE [dotted overrides]`.

Our step with one improvement switched off at a time, with all of them off, and the published step.
Every variant is a process of its own, and all take turns (`bench.measure.contest`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.measure.contest import Contestant, Result
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of, quantiles
from bench.steps.switches import Switch, switches
from fastmoco.config import dump, parse
from fastmoco.method.build import compile_encoders

OURS, ALL_OFF, PUBLISHED = "nothing", "all of these", "published step"


def variants(own: Options) -> list[Contestant]:
    """Named by what is off; those between the first and the last two lack one improvement each."""

    def variant(name: str, *off: Switch, factory: str = "our_step") -> Contestant:
        words = [word for switch in off for word in switch.overrides]
        without = [word for switch in off for word in switch.without]
        given: dict[str, Any] = {"config": dump(parse([*own.rest, *words]))}
        given |= {"without": without} if without else {}
        return Contestant(name, f"bench.steps.contestants:{factory}", given)

    compiled = compile_encoders(own.config, own.device)
    found = switches(own.config, own.device.type == "cuda", compiled)
    return [
        variant(OURS),
        *(variant(f"{switch.name} ({switch.instead} instead)", switch) for switch in found),
        variant(ALL_OFF, *found),
        variant(PUBLISHED, factory="official_step"),
    ]


def rows_of(results: Mapping[str, Result], case: Row) -> list[Row]:
    """One row per variant; `relative` are times of a step over those of `OURS` in the same turn."""
    rows, whole = [], results[OURS].windows
    for name, result in results.items():
        turns = zip(result.windows, whole, strict=True)
        busy, of_ours = (sum(w.cpu_seconds for w in x) for x in (result.windows, whole))
        rows.append(
            {
                "benchmark": "ablation",
                "case": case | {"part": "switches"},
                "contestant": name,
                "relative": quantiles([a.seconds / b.seconds for a, b in turns]),
                "relative_cpu": round(busy / of_ours, 4),
                "step_ms": quantiles([1e3 * w.seconds / w.steps for w in result.windows], 3),
                **result.row(case["batch"]),
            }
        )
    return rows


@command(parser("ablation", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """One row per variant."""
    yield rows_of(compete(own, variants(own)), case_of(own.config))


if __name__ == "__main__":
    sys.exit(main())
