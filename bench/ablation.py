"""What each improvement is worth: `python -m bench.ablation --config FILE [dotted overrides]`.

Our step with one improvement switched off at a time, with all of them off, and the published step.
With --safety what safety costs instead: a checkpoint at the beginning of each window (--steps 100:
every 100 steps), written by a thread as the trainer does, and `run.nonfinite skip`.
Every variant is a process of its own, and all take turns (`bench.measure.contest`). On a GPU the
host launches all: not every variant can be a CUDA graph, whose worth `bench.throughput` tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from bench.measure.contest import Contestant, Result
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of, quantiles
from bench.steps.switches import switches
from fastmoco.config import dump, parse
from fastmoco.method.build import compile_encoders

OURS, ALL_OFF, PUBLISHED = "nothing", "all of these", "published step"


def variant(
    own: Options,
    name: str,
    overrides: Sequence[str] = (),
    without: Sequence[str] = (),
    factory: str = "our_step",
) -> Contestant:
    """A step of the options with some overridden, and without some improvements."""
    launched = "--run.cuda_graph=off"
    given: dict[str, object] = {"config": dump(parse([launched, *own.rest, *overrides]))}
    given |= {"without": list(without)} if without else {}
    return Contestant(name, f"bench.steps.contestants:{factory}", given)


def variants(own: Options) -> list[Contestant]:
    """Named by what is off; those between the first and the last two lack one improvement each."""
    compiled = compile_encoders(own.config, own.device)
    found = switches(own.config, own.device.type == "cuda", compiled)
    overrides = [word for switch in found for word in switch.overrides]
    without = [word for switch in found for word in switch.without]
    return [
        variant(own, OURS),
        *(variant(own, f"{s.name} ({s.instead} instead)", s.overrides, s.without) for s in found),
        variant(own, ALL_OFF, overrides, without),
        variant(own, PUBLISHED, factory="official_step"),
    ]


def safety(own: Options) -> list[Contestant]:
    """Named by what they do beside a step."""
    return [
        variant(own, OURS),
        variant(own, "a checkpoint per window", factory="saving_step"),
        variant(own, "run.nonfinite skip", ["--run.nonfinite", "skip"]),
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
                "case": case,
                "contestant": name,
                "relative": quantiles([a.seconds / b.seconds for a, b in turns]),
                "relative_cpu": round(busy / of_ours, 4),
                "step_ms": quantiles([1e3 * w.seconds / w.steps for w in result.windows], 3),
                **result.row(case["batch"]),
            }
        )
    return rows


PARSER = parser("ablation", __doc__, only=False)
PARSER.add_argument("--safety", action="store_true", help="what safety costs instead")


@command(PARSER)
def main(own: Options) -> Iterator[list[Row]]:
    """One row per variant."""
    racing, part = (safety, "safety") if own.safety else (variants, "switches")
    yield rows_of(compete(own, racing(own)), case_of(own.config) | {"part": part})


if __name__ == "__main__":
    sys.exit(main())
