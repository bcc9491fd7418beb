"""Interleaved timing of contenders, peak memory, and append-only rows that say whence they come.

A contender is a name, a callable and a check of its output; every output is checked against its
oracle before anything is timed. Contenders are timed in turns, A B C A B C, so that a noisy machine
is noisy for all of them. Works on the CPU and, with CUDA events, on CUDA.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastmoco_kernels import processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    """Distance of an output of `run` from the oracle."""
    allowed: float
    """Largest `error` with which it is admitted to the timing."""


# Name, case and contenders.
Race = tuple[str, dict[str, Any], list[Contender]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: percentiles over n calls, and the error that was checked before."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    n: int
    error: float
    peak_extra_bytes: int


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; share from 0 to 1."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """p20, p50 and p80, rounded."""
    return [round(percentile(values, share), digits) for share in (0.2, 0.5, 0.8)]


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """p20, p50, p80 and n of some measurements, as they stand in a row."""
    p20, p50, p80 = percentiles(values, digits)
    return {"p20": p20, "p50": p50, "p80": p80, "n": len(values)}


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive at once during one call, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def race(
    contenders: Sequence[Contender],
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    limit_seconds: float = 120.0,
) -> dict[str, Timing]:
    """Check every contender, then time them in turns for `rounds` rounds or until the limit.

    Raises ValueError when an output is further from its oracle than allowed.
    """
    errors, memory = {}, {}
    for contender in contenders:
        for _ in range(warmup):
            output = contender.run()
        error = errors[contender.name] = contender.error(output)
        if not error <= contender.allowed:
            raise ValueError(f"{contender.name}: error {error:.2e} > {contender.allowed:.0e}")
        del output
        memory[contender.name] = peak_extra_bytes(contender.run, device)
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    for turn in range(rounds):
        shift = turn % len(contenders)  # nobody always runs in the wake of the same one
        for contender in [*contenders[shift:], *contenders[:shift]]:
            samples[contender.name].append(_milliseconds(contender.run, device))
        if time.perf_counter() - start > limit_seconds:
            break
    timings = {}
    for name, times in samples.items():
        p20, p50, p80 = percentiles(times)
        timings[name] = Timing(p20, p50, p80, len(times), errors[name], memory[name])
    return timings


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout.strip()


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _gpu(device: torch.device) -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    try:
        query = [f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}"]
        run = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return {}
    return dict(zip(fields, (x.strip() for x in run.stdout.split(",")), strict=False))


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a number: hardware, versions, commit, load, command."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "gpu": _gpu(device) if cuda else {},
        "cpu": _cpu_model(),
        "extension": processor.best(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dali": _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def append_rows(
    path: Path,
    benchmark: str,
    case: Mapping[str, Any],
    timings: Mapping[str, Timing],
    where: Mapping[str, Any],
) -> None:
    """One JSON line per contender; rows of one race share the environment with its date."""
    shared = {"benchmark": benchmark, "case": dict(case)}
    rows = (
        {**shared, "contender": name, **asdict(timing), "environment": dict(where)}
        for name, timing in timings.items()
    )
    write_rows(path, rows)


def table(timings: Mapping[str, Timing], baseline: str) -> str:
    """The timings as text, with the speed-up of the medians over the baseline."""
    base = timings[baseline]
    lines = [f"{'':24s} {'p20':>9s} {'p50':>9s} {'p80':>9s} ms   speed-up  extra MiB"]
    for name, t in timings.items():
        times = f"{t.p20_ms:9.3f} {t.p50_ms:9.3f} {t.p80_ms:9.3f}"
        gain, extra = base.p50_ms / t.p50_ms, t.peak_extra_bytes / 2**20
        lines.append(f"{name:24s} {times}      {gain:8.2f}  {extra:9.2f}")
    return "\n".join(lines)
