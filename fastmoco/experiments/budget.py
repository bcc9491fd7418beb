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
from fastmoco.experiments.runs import RESULT, Run, run_all
from fastmoco.machine import durable
from fastmoco.run.record import METRICS, read_metrics

PLAN = "budget.json"
TRIAL_STEPS = 12
# Evaluations during a run: more cost time, fewer show no curve.
_EVALUATIONS = 6
# What decides the cost of a step; everything else is the same work with other numbers.
_COSTLY = ("model.", "augment.", "data.")
_COSTLY_OPTIONS = (
    *("optim.global_batch_size", "optim.accumulate", "moco.mechanism", "moco.symmetric"),
    *("run.device", "run.precision", "run.compile", "run.cuda_graph"),
)
# The options that a budget decides.
_LENGTH = {"optim.epochs", "knn.every", "run.max_steps"}


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

    They are kept in `out`, so that a later call goes on with the same ones; where what was kept is
    damaged, they follow again from the trials. Raises `ConfigError` for a budget that is too small
    or another than that of `out`, and for a trial that failed.
    """
    if (kept := _kept(out / PLAN, minutes, say)) is not None:
        return kept
    runs: dict[str, Run] = {}
    count: dict[str, int] = {}
    for grid in grids:
        for point in grid.points:
            options = merged(point.options, common)
            name = kind(grid, options)
            runs.setdefault(name, trial(grid, options, out / f"trial{len(runs)}"))
            count[name] = count.get(name, 0) + len(grid.seeds)
    for run in runs.values():
        if not run.same_options() or cost(run) is None:
            (run.folder / RESULT).unlink(missing_ok=True)
    say(f"measuring what a step costs, in {len(runs)} trials of {TRIAL_STEPS} steps")
    if not run_all(list(runs.values()), jobs, say, afresh=True):
        return None
    costs = {name: measured(run) for name, run in runs.items()}
    spent = sum(cost.start + TRIAL_STEPS * cost.step for cost in costs.values())
    epochs = affordable(costs, count, 60 * minutes * jobs - spent)
    found = {name: length(cost, epochs) for name, cost in costs.items()}
    text = json.dumps({"minutes": minutes, "epochs": epochs, "lengths": found}, indent=1)
    durable.replace(out / PLAN, lambda partial: partial.write_text(text, encoding="utf-8"))
    say(f"{sum(count.values())} runs of {epochs:.2f} epochs fit into {minutes:g} minutes")
    return found


def _kept(file: Path, minutes: float, say: Callable[[str], None]) -> dict[str, Options] | None:
    """The lengths in a file that `lengths` wrote, None where there are none, or damaged ones.

    Raises `ConfigError` if they are for other `minutes`, or cannot be read.
    """
    try:
        content = json.loads(durable.read_regular(file))
        then = float(content["minutes"])
        found = {
            kind: tuple((name, str(int(value))) for name, value in options)
            for kind, options in content["lengths"].items()
        }
        sound = math.isfinite(then) and all(
            "optim.epochs" in dict(options) and _LENGTH.issuperset(dict(options))
            for options in found.values()
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error}): delete it, or mend that.") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        say(f"{file} is damaged: the lengths of runs are found again from the trials beside it")
        return None
    if then != minutes:
        raise ConfigError(
            f"{file.parent} holds runs for a budget of {then:g} minutes: give the same one to go "
            "on, or another --out."
        )
    return found


def trial(grid: Grid, options: Options, folder: Path) -> Run:
    """A run of a few steps with the options of a point."""
    short = {"run.max_steps": TRIAL_STEPS, "run.log_every": 4, "knn.every": 1, "run.seed": 0}
    given = tuple((name, str(value)) for name, value in short.items())
    return Run(folder, merged(options, given), grid.recipe)


def measured(run: Run) -> Cost:
    """The cost that a trial found. Raises `ConfigError` if it failed."""
    found, result = cost(run), run.ended() or {}
    if found is None:
        code, sentence = result.get("code"), str(result.get("sentence")).rstrip(".")
        how = f"failed: {sentence}" if code else "recorded no step that tells a cost"
        raise ConfigError(f"The trial in {run.folder} {how}; mend that and try again.")
    return found


def cost(run: Run) -> Cost | None:
    """The same; None if it has not ended, has failed, or left damaged records."""
    result = run.ended() or {}
    if result.get("code") != 0:
        return None
    try:
        records = read_metrics(run.folder / METRICS)
        last = [r for r in records if r.kind == "train" and not r.warmup][-1]
        step = last.values["step_ms_p50"] / 1000
        start = max(0.0, float(result["seconds"]) - TRIAL_STEPS * step)
        found = Cost(start, step, round(last.step / last.epoch))
    except (ConfigError, LookupError, TypeError, ValueError, ArithmeticError):
        return None
    sound = 0 < found.step < math.inf and found.start < math.inf and found.steps_per_epoch > 0
    return found if sound else None


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
