"""What each improvement is worth: `python -m bench.ablation --config FILE [dotted overrides]`.

    --parts A,B      some of: switches, waterfall, data (these three by default), compile
    --windows N      timed windows of each variant (20)
    --publish        append rows to bench/results/ablation.jsonl; refused for a dirty tree

`switches` is our step with one improvement switched off at a time. `waterfall` goes from the
published step to ours: first the same algorithm as this program runs it with everything off, then
one improvement after another, so gains add up and depend on the order. `data` is the step fed by
the loader, with the other executor of the views (not for synthetic data). `compile` is the
opposite of what `run.compile` means here, which takes minutes to compile on the CPU. Every variant
is a process of its own, and those of a part take turns (`bench.measure.contest`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.measure import nvml, terminal
from bench.measure.case import case_of, device_of, origin
from bench.measure.contest import Contestant, Result, contest
from bench.measure.harness import RESULTS, percentiles, write_rows
from bench.steps.switches import Switch, switches
from bench.throughput import summary
from fastmoco.config import Config, ConfigError, check, dump, parse
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.method.build import compile_encoders

ROWS = RESULTS / "ablation.jsonl"
EVERYTHING = "nothing"
PUBLISHED, PLAIN = "published step", "this program, all off"
PARTS = ("switches", "waterfall", "data", "compile")


@dataclass(frozen=True)
class Variant:
    """One way to run the step: a factory in `contestants.py` and how it differs from ours."""

    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    factory: str = "our_step"


def improvements(config: Config) -> list[str]:
    """Names of the switches, in the order of the waterfall."""
    return [switch.name for switch in _chosen(config)]


def _chosen(config: Config) -> list[Switch]:
    device = device_of(config)
    return switches(config, device.type == "cuda", compile_encoders(config, device))


def variants(part: str, config: Config) -> dict[str, Variant]:
    """The variants of a part by name; the one that others are relative to is `EVERYTHING`."""
    device, chosen = device_of(config), _chosen(config)
    cuda, compiled = device.type == "cuda", compile_encoders(config, device)
    ours = {EVERYTHING: Variant()}
    if part == "switches":
        return ours | {
            f"{s.name} ({s.instead} instead)": Variant(s.overrides, s.without) for s in chosen
        }
    if part == "waterfall":
        names = [PLAIN, *(s.name for s in chosen[:-1])]
        steps = {
            name: Variant(
                tuple(word for s in chosen[done:] for word in s.overrides),
                tuple(word for s in chosen[done:] for word in s.without),
            )
            for done, name in enumerate(names)
        }
        return {PUBLISHED: Variant(factory="official_step"), **steps} | ours
    if part == "data":
        backend = config.data.backend
        now = ("dali" if cuda and has_dali() else "array") if backend == "auto" else backend
        other = "array" if now == "dali" else "dali"
        return {
            EVERYTHING: Variant(factory="end_to_end"),
            f"{now} loader ({other} instead)": Variant(
                ("--data.backend", other), factory="end_to_end"
            ),
        }
    name = "run.compile off (on instead)"
    if compiled:
        name = "run.compile on (off instead)"
    return ours | {name: Variant(("--run.compile", "off" if compiled else "on"))}


def relative(results: Mapping[str, Result], name: str) -> tuple[list[float], float]:
    """p20, p50, p80 over turns of the time of a step, and its processor time, to EVERYTHING's."""
    mine, whole = results[name].windows, results[EVERYTHING].windows
    turns = [a.seconds / b.seconds for a, b in zip(mine, whole, strict=True)]
    busy = sum(w.cpu_seconds for w in mine) / sum(w.cpu_seconds for w in whole)
    return percentiles(turns), round(busy, 4)


def rows_of(results: Mapping[str, Result], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
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
                "step_ms": percentiles(step_ms, 3),
                **summary(result, shared["case"]["batch"]),
            }
        )
    return rows


def run_part(part: str, arguments: Sequence[str], windows: int) -> dict[str, Result]:
    """The contest of one part; `arguments` give the configuration."""
    config = parse(arguments)
    device = device_of(config)
    steps = 10 if device.type == "cuda" else 1
    contestants = []
    for name, variant in variants(part, config).items():
        changed = parse([*arguments, *variant.overrides])
        if part == "data":
            changed = resolve_folders(changed)
        given: dict[str, Any] = {"config": dump(changed)}
        if variant.without:
            given["without"] = variant.without
        contestants.append(Contestant(name, f"bench.steps.contestants:{variant.factory}", given))
    return contest(
        contestants,
        windows=windows,
        steps=max(steps, 4) if part == "data" else steps,
        warmup=max(2, steps),
        lead=config.data.prefetch + 2 if part == "data" else 0,
        meter=nvml.build_meter(device, partial(terminal.complain, "ablation")),
        progress=lambda done: terminal.progress(done, windows),
    )


def parts_of(named: str, config: Config) -> list[str]:
    """The parts to run. Raises `ConfigError` for one that does not exist or cannot run."""
    synthetic = config.data.source == "synthetic"
    if not named:
        fed = not synthetic and has_dali()
        return ["switches", "waterfall", *(["data"] if fed else [])]
    chosen = named.split(",")
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise ConfigError(f"--parts knows {', '.join(PARTS)}, not {', '.join(unknown)}.")
    if "data" in chosen and (synthetic or not has_dali()):
        raise ConfigError("--parts data needs images (data.source) and DALI.")
    return chosen


@terminal.command("ablation")
def main(arguments: Sequence[str]) -> None:
    """Print a table per part; with --publish also append its rows."""
    parser = argparse.ArgumentParser("bench.ablation", description=__doc__, add_help=False)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--parts", default="")
    parser.add_argument("--publish", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    check(config, 1)
    parts = parts_of(own.parts, config)
    where = origin(device_of(config), own.publish)
    for part in parts:
        results = run_part(part, rest, own.windows)
        shared: dict[str, Any] = {"benchmark": "ablation", "case": case_of(config) | {"part": part}}
        if part == "waterfall":
            shared["order"] = improvements(config)
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
            write_rows(ROWS, ({**row, "environment": where} for row in rows))


if __name__ == "__main__":
    sys.exit(main())
