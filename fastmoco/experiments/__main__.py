"""`fastmoco experiment NAME --data.root DIR --budget MINUTES --out DIR`: a grid of runs, drawn.

Every run is an ordinary `fastmoco train` in a directory of its own below DIR/NAME. The same command
goes on where it was stopped. DIR/NAME.png is the figure, DIR/NAME.jsonl a row for every run.
Further options of training (`--model.width 0.5`) hold for all runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fastmoco.config import Config, ConfigError, flatten
from fastmoco.config.command import CommandParser
from fastmoco.experiments.budget import kind, lengths
from fastmoco.experiments.figure import draw
from fastmoco.experiments.grid import GRIDS, Grid, Options, Point, load_grids, merged
from fastmoco.experiments.results import results, table, write_rows
from fastmoco.experiments.runs import Plan, run_all
from fastmoco.machine.stopping import exit_code


def training_options(words: Sequence[str]) -> Options:
    """`--model.width 0.5 --optim.lr=1` as pairs. Raises `ConfigError` for what is no option."""
    found: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in flatten(Config()):
            raise ConfigError(f"{name} is no option of fastmoco experiment or of training.")
        if not equals:
            if not rest:
                raise ConfigError(f"{name} lacks a value.")
            value = rest.pop(0)
        found.append((name[2:], value))
    return merged(tuple(found))


def _check(grids: Sequence[Grid], common: Options, budget: float | None) -> None:
    """Raises `ConfigError` where the command contradicts the grid."""
    for grid in grids:
        owned = grid.varied() | {"run.seed", "run.dir"}
        if mine := sorted(owned & {name for name, _ in common}):
            raise ConfigError(f"the grid {grid.name} sets {', '.join(mine)} itself: leave it out.")
    fixed = {"run.max_steps", "optim.epochs"} & {
        name for grid in grids for point in grid.points for name, _ in (*common, *point.options)
    }
    if budget is None and not fixed:
        raise ConfigError("say how long all runs may take: --budget MINUTES.")
    if budget is not None and fixed:
        raise ConfigError(f"{' and '.join(sorted(fixed))} is set: leave out that or --budget.")


def experiment(
    name: str, out: Path, common: Options, budget: float | None = None, jobs: int = 1
) -> int:
    """Run what is left of the grid and draw it: exit code 0, 1 if a run failed, 130 if stopped.

    Raises `ConfigError` before anything is run for a grid or options that cannot be trained.
    """
    grids = load_grids(name)
    _check(grids, common, budget)
    Plan(grids, out, lambda *_: common)  # refuses what cannot train before anything runs
    found: dict[str, Options] = {}
    if budget is not None:
        trials = out / f"{Path(name).stem}-trials"
        trials.mkdir(parents=True, exist_ok=True)
        measured = lengths(grids, common, trials, budget, jobs, _say)
        if measured is None:
            return 130
        found = measured

    def more(grid: Grid, point: Point) -> Options:
        options = merged(point.options, common)
        name = kind(grid, options)
        if budget is not None and name not in found:
            raise ConfigError(
                f"{out} was measured for runs with other options than {name}: choose another "
                "--out, or give the options of then."
            )
        return merged(common, found.get(name, ()))

    plan = Plan(grids, out, more)
    runs = plan.distinct()
    for run in runs:
        run.require_same()
    with tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty()) as bar:

        def say(line: str) -> None:
            _say(line)
            bar.update(sum(run.ended() is not None for run in runs) - bar.n)

        finished = run_all(runs, jobs, say)
    failed = False
    for grid in grids:
        ended = results(grid, plan)
        failed |= any(result.failure for result in ended)
        print(f"{grid.title} ({grid.name})", *table(grid, ended), sep="\n")
        write_rows(grid, ended, out / f"{grid.name}.jsonl")
        draw(grid, ended, out / f"{grid.name}.png")
        print(f"  {out / grid.name}.png")
    if not finished:
        print("stopped by a signal: the same command goes on")
        return 130
    return int(failed)


def _say(line: str) -> None:
    """At once, also into a file: what is waited for may take hours."""
    tqdm.write(line)
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a run failed, 2 for input that cannot be run, 130 if stopped."""
    parser = CommandParser(
        prog="fastmoco experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(sorted(path.stem for path in GRIDS.glob("*.yaml")))
    parser.add_argument("name", help=f"{names}, or a YAML file like those")
    parser.add_argument("--data.root", dest="root", help="folder of images")
    parser.add_argument("--budget", type=float, help="minutes that all runs may take, about")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and figures")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    given, rest = parser.parse_known_args(arguments)
    try:
        budget = 1.0 if given.budget is None else given.budget
        if given.jobs < 1 or not 0 < budget < math.inf:
            raise ConfigError("--jobs and --budget must be greater than 0.")
        common = training_options(rest)
        if given.root:
            common = merged(common, (("data.root", given.root),))
        return experiment(given.name, given.out, common, given.budget, given.jobs)
    except (ConfigError, OSError) as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(exit_code(main))
