"""How long the runs may be, so that all of them together take about the time that there is.

As in the paper, all runs train for the same number of epochs. A short trial of each kind of run
tells what a step and what a start cost on this machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.experiments.grid import Grid, Options, merged
from fastmoco.experiments.runs import Run, run_all
from fastmoco.run.record import METRICS, read_metrics

PLAN = "budget.json"
TRIAL_STEPS = 12
# Evaluations during a run: more cost time, fewer show no curve.
_EVALUATIONS = 6
# What decides the cost of a step; everything else is the same work with other numbers.
_COSTLY = ("model.", "augment.", "data.")
_COSTLY_OPTIONS = ("optim.global_batch_size", "moco.mechanism", "moco.symmetric")


@dataclass(frozen=True)
class Cost:
    """What a kind of run costs, in seconds."""

    start: float
    """Starting, kNN before and after training, pictures."""
    step: float
    steps_per_epoch: int


def kind(grid: Grid, options: Options) -> str:
    """A name that runs of equal cost share."""
    costly = [o for o in sorted(options) if o[0].startswith(_COSTLY) or o[0] in _COSTLY_OPTIONS]
    return " ".join([grid.recipe, *(f"{name}={value}" for name, value in costly)])


def lengths(
    grids: Sequence[Grid],
    common: Options,
    out: Path,
    minutes: float,
    jobs: int,
    say: Callable[[str], None],
) -> dict[str, Options] | None:
    """Options of length for each kind of run; None when a signal asked to stop.

    They are kept in `out`, so that a later call goes on with the same ones. Raises `ConfigError`
    for a budget that is too small or another than that of `out`.
    """
    file = out / PLAN
    if file.is_file():
        then, lengths = _kept(file)
        if then != minutes:
            raise ConfigError(
                f"{out} holds runs for a budget of {then:g} minutes: give the same one to go on, "
                "or another --out."
            )
        return lengths
    runs: dict[str, Run] = {}
    count: dict[str, int] = {}
    for grid in grids:
        for point in grid.points:
            options = merged(point.options, common)
            name = kind(grid, options)
            runs.setdefault(name, trial(grid, options, out / f"trial{len(runs)}"))
            count[name] = count.get(name, 0) + len(grid.seeds)
    say(f"measuring what a step costs, in {len(runs)} trials of {TRIAL_STEPS} steps")
    if not run_all(list(runs.values()), jobs, say):
        return None
    costs = {name: measured(run) for name, run in runs.items()}
    spent = sum(cost.start + TRIAL_STEPS * cost.step for cost in costs.values())
    epochs = affordable(costs, count, 60 * minutes * jobs - spent)
    found = {name: length(cost, epochs) for name, cost in costs.items()}
    file.write_text(json.dumps({"minutes": minutes, "epochs": epochs, "lengths": found}, indent=1))
    say(f"{sum(count.values())} runs of {epochs:.2f} epochs fit into {minutes:g} minutes")
    return found


def trial(grid: Grid, options: Options, folder: Path) -> Run:
    """A run of a few steps with the options of a point."""
    short = {"run.max_steps": TRIAL_STEPS, "run.log_every": 4, "knn.every": 1, "run.seed": 0}
    given = tuple((name, str(value)) for name, value in short.items())
    return Run(folder, merged(options, given), grid.recipe)


def measured(run: Run) -> Cost:
    """The cost that a trial found. Raises `ConfigError` if it failed."""
    result = run.ended() or {}
    if result.get("code") != 0:
        raise ConfigError(f"the trial in {run.folder} failed: {result.get('sentence')}")
    records = read_metrics(run.folder / METRICS)
    last = [r for r in records if r.kind == "train" and not r.warmup][-1]
    step = last.values["step_ms_p50"] / 1000
    start = max(0.0, float(result["seconds"]) - TRIAL_STEPS * step)
    return Cost(start, step, round(last.step / last.epoch))


def _kept(file: Path) -> tuple[float, dict[str, Options]]:
    """The budget in minutes that was measured for, and the lengths. Raises `ConfigError`."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        lengths = {
            kind: tuple((str(name), str(value)) for name, value in options)
            for kind, options in kept["lengths"].items()
        }
        return float(kept["minutes"]), lengths
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} does not say what was measured: delete it to measure again, or give another "
            "--out."
        ) from error


def affordable(costs: dict[str, Cost], count: dict[str, int], seconds: float) -> float:
    """Epochs for every run, so that `count` runs of each kind take `seconds` together.

    Raises `ConfigError` where that is less than a step.
    """
    starts = sum(costs[name].start * runs for name, runs in count.items())
    epoch = sum(costs[n].step * costs[n].steps_per_epoch * runs for n, runs in count.items())
    epochs = (seconds - starts) / epoch
    least = 1 / min(cost.steps_per_epoch for cost in costs.values())
    if epochs < least:
        missing = starts + least * epoch - seconds
        raise ConfigError(
            f"the budget is too small: starting {sum(count.values())} runs takes {starts:.0f} s "
            f"here; give at least {math.ceil(missing / 60)} minutes more."
        )
    return epochs


def length(cost: Cost, epochs: float) -> Options:
    """Whole epochs, or the beginning of the first."""
    whole = max(1, math.floor(epochs))
    options = {"optim.epochs": whole, "knn.every": math.ceil(whole / _EVALUATIONS)}
    if epochs < 1:
        options["run.max_steps"] = max(1, math.floor(epochs * cost.steps_per_epoch))
    return tuple((name, str(value)) for name, value in options.items())
