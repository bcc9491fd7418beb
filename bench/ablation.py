"""What each improvement is worth: our step with one thing switched off at a time.

    python -m bench.ablation --config FILE [--windows N] [--publish] [dotted overrides]

Every variant is a process of its own and they take turns (`bench.contest`). Variants that differ
in nothing on this machine are left out. `--compile` adds the opposite of what `run.compile` means
here, which takes minutes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.case import case_of, device_of, origin
from bench.contest import Contestant, Result, contest
from bench.harness import RESULTS, percentile
from fastmoco.config import ConfigError, check, dump, parse

ROWS = RESULTS / "ablation.jsonl"
EVERYTHING = "nothing"


@dataclass(frozen=True)
class Variant:
    """How to switch one thing off: by the configuration, or in `bench.machines.our_step`."""

    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


VARIANTS: dict[str, Variant] = {
    EVERYTHING: Variant(),
    "bf16 (fp32 instead)": Variant(overrides=("--run.precision", "fp32")),
    "channels-last (NCHW instead)": Variant(without=("channels_last",)),
    "fused loss (N x K logits instead)": Variant(without=("fused_loss",)),
    "fused update (torch SGD, then EMA)": Variant(overrides=("--optim.name", "sgd")),
    "uint8 input (fp32 instead)": Variant(without=("uint8_input",)),
    "freed memory kept (default malloc)": Variant(without=("kept_memory",)),
}
COMPILE = "run.compile as it is (the opposite)"


def variants(cuda: bool, with_compile: bool, compiled: bool) -> dict[str, Variant]:
    """Those that make a difference here."""
    chosen = dict(VARIANTS)
    if cuda:
        del chosen["freed memory kept (default malloc)"]
    if with_compile:
        chosen[COMPILE] = Variant(overrides=("--run.compile", "off" if compiled else "on"))
    return chosen


def relative(results: Mapping[str, Result], name: str) -> tuple[list[float], float]:
    """p20, p50, p80 over turns of the time of a step, and its processor time, to EVERYTHING's."""
    mine, whole = results[name].windows, results[EVERYTHING].windows
    turns = [a.seconds / b.seconds for a, b in zip(mine, whole, strict=True)]
    busy = sum(w.cpu_seconds for w in mine) / sum(w.cpu_seconds for w in whole)
    return [round(percentile(turns, share), 4) for share in (0.2, 0.5, 0.8)], round(busy, 4)


def rows_of(results: Mapping[str, Result], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per variant."""
    rows = []
    for name, result in results.items():
        times, busy = relative(results, name)
        rows.append(
            {
                **shared,
                "contestant": name,
                "relative": times,
                "relative_cpu": busy,
                "n": len(result.windows),
                **result.facts,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a configuration that cannot run or rows that must not be published."""
    parser = argparse.ArgumentParser("bench.ablation", description=__doc__, add_help=False)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--publish", action="store_true")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(rest)
        check(config, 1)
        cuda = device_of(config).type == "cuda"
        where = origin(config, own.publish)
        compiled = config.run.compile == "on" or (config.run.compile == "auto" and cuda)
        contestants = [
            Contestant(
                name,
                "bench.machines:our_step",
                {"config": dump(parse([*rest, *v.overrides])), "without": v.without},
            )
            for name, v in variants(cuda, own.compile, compiled).items()
        ]
    except ConfigError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    steps = 10 if cuda else 1
    results = contest(contestants, windows=own.windows, steps=steps, warmup=max(2, steps))
    rows = rows_of(
        results, {"benchmark": "ablation", "case": case_of(config), "environment": where}
    )
    for row in rows:
        p20, p50, p80 = row["relative"]
        print(
            f"{row['contestant']:40s}{p50:6.2f}  ({p20:.2f} - {p80:.2f})"
            f"  CPU time {row['relative_cpu']:.2f}"
        )
    if own.publish:
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        with ROWS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
