"""The runs of a grid: their commands, and running those that are not finished.

Every run is the command that a user would type, `fastmoco train OPTIONS`, with a directory of its
own. It writes `experiment.json` there when it ends, so a run that has ended is not repeated.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastmoco import __version__
from fastmoco.config import Config, ConfigError, check, parse
from fastmoco.config.parsing import recipe_path
from fastmoco.experiments.grid import Grid, Options, Point, merged
from fastmoco.machine import durable, owner
from fastmoco.machine.host import machine_cores
from fastmoco.machine.stopping import INTERRUPTED, REQUEUE, StopRequest
from fastmoco_kernels import processor

RESULT = "experiment.json"
LOG = "train.log"
_POLL_S = 0.1
# Of files, in bytes, on the file systems in use.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Run:
    """One training run of a grid."""

    folder: Path
    options: Options
    """All but `run.dir`."""
    recipe: str

    def arguments(self) -> list[str]:
        """What follows `fastmoco train`."""
        given = [f"--{name}={value}" for name, value in self.options]
        return ["--config", str(recipe_path(self.recipe)), *given, f"--run.dir={self.folder}"]

    def command(self) -> str:
        """The line that repeats the run."""
        return shlex.join(["fastmoco", "train", *self.arguments()])

    def ended(self) -> dict[str, Any] | None:
        """`code` and `sentence` of a run that has ended, None for one that has not.

        A damaged file counts as none: the trainer knows what is left to do.
        """
        try:
            result = json.loads(durable.read_regular(self.folder / RESULT))
            shlex.split(result.get("command", ""))
            sound = type(result["code"]) is int and isinstance(result.get("sentence", ""), str)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return result if sound else None

    def same_options(self) -> bool:
        """Whether what has ended in the directory was run with these options, and this recipe."""
        command = (self.ended() or {}).get("command", self.command())
        return _options(command) == _options(self.command())

    def require_same(self) -> None:
        """Raise `ConfigError` if the directory holds what a run with other options ended with."""
        if not self.same_options():
            theirs = (self.ended() or {})["command"]
            raise ConfigError(
                f"{self.folder} holds a run with other options ({theirs}): choose another --out, "
                "or give the options of then."
            )


@cache
def configuration(recipe: str, options: Options) -> Config:
    """What a run trains, its directory aside. Raises `ConfigError` where that cannot train."""
    given = [f"--{name}={value}" for name, value in options]
    config = parse(["--config", str(recipe_path(recipe)), *given, "--run.dir="])
    check(config, 1)
    return config


class Plan:
    """The runs of all points and seeds, by (grid, line, x, seed); equal runs are one.

    `more` gives further options of each point, which override those of the grid. Raises
    `ConfigError` for options that cannot train.
    """

    def __init__(
        self, grids: Sequence[Grid], out: Path, more: Callable[[Grid, Point], Options]
    ) -> None:
        self.runs: dict[tuple[str, str, object, int], Run] = {}
        equal: dict[Config, Run] = {}
        for grid in grids:
            for point in grid.points:
                for seed in grid.seeds:
                    options = merged(point.options, more(grid, point))
                    options = merged(options, (("run.seed", str(seed)),))
                    run = Run(out / grid.name / folder_name(point, seed), options, grid.recipe)
                    run = equal.setdefault(configuration(grid.recipe, options), run)
                    self.runs[grid.name, point.line, point.x, seed] = run
        folders = [run.folder for run in self.distinct()]
        if len(set(folders)) < len(folders):
            raise ConfigError("Two points of the grid have the same name: name its lines apart.")
        for folder in folders:
            if len(os.fsencode(folder.name)) > _LONGEST_NAME:
                raise ConfigError(
                    f"{folder.name} is too long for a folder: shorten its line's name."
                )

    def distinct(self) -> list[Run]:
        """Every run once, in order."""
        return list(dict.fromkeys(self.runs.values()))


def _options(command: str) -> set[str]:
    """Of a command line and its recipe, without the places of files."""
    words = shlex.split(command)
    recipe = {f"--config={Path(file).stem}" for w, file in pairwise(words) if w == "--config"}
    given = {w for w in words if w.startswith("--") and not w.startswith("--run.dir=")}
    return recipe | given - {"--config"}


def folder_name(point: Point, seed: int) -> str:
    """Of a run, such as `memory-bank-256-seed0`."""
    x = f"{point.x:g}" if isinstance(point.x, float) else point.x
    return re.sub(r"[^\w.+]+", "-", f"{point.line}-{x}-seed{seed}")


def run_all(
    runs: Sequence[Run], jobs: int, say: Callable[[str], None], *, afresh: bool = False
) -> bool:
    """Run what has not ended, `jobs` at a time; False when a signal asked to stop.

    A run that a signal stopped goes on at the next call; `afresh`, its directory is deleted first.
    One that failed has ended: delete its `experiment.json` to try it again.
    """
    waiting = [run for run in runs if run.ended() is None]
    places: list[_Place] = []
    done = len(runs) - len(waiting)
    with StopRequest() as request:
        request.patient = True
        try:
            while places or (waiting and not request.made):
                while waiting and len(places) < jobs and not request.made:
                    places.append(_Place(waiting.pop(0), jobs, say, afresh))
                if request.made:
                    _end(places, subprocess.Popen.terminate)
                for place in [place for place in places if place.through(request.made)]:
                    places.remove(place)
                    if place.run.ended() is not None:
                        done += 1
                        say(f"{done}/{len(runs)} {_told(place.run)}")
                time.sleep(_POLL_S)
        finally:
            _end(places, subprocess.Popen.kill)  # only after an error or a second Ctrl-C
    return not request.made


class _Place:
    """One of the places in which runs are trained at a time, and the run that has it.

    A trainer that outlived its experiment still owns the run's directory. It has the place until it
    ends, and is not counted as a failure of the run. Then a trainer of ours goes on: it knows
    whether anything is left to do.
    """

    def __init__(self, run: Run, jobs: int, say: Callable[[str], None], afresh: bool) -> None:
        self.run = run
        self.trainer: subprocess.Popen[bytes] | None = None
        self._jobs, self._say, self._afresh = jobs, say, afresh
        self._watch, self._told = owner.Watch(run.folder), ""
        self._began, self._log_before = 0.0, 0

    def through(self, stopped: bool) -> bool:
        """Do what is next, without waiting; True when the run has ended or was stopped.

        Where all are `stopped`, also one whose process took no signal yet and was killed by it.
        """
        if self.trainer is None:
            if stopped or self.run.ended() is not None:  # by the experiment that was waited for
                return True
            if not self._owned():
                self._start()
            return False
        code = self.trainer.poll()
        if code is None:
            return False
        if code in (INTERRUPTED, REQUEUE) or (stopped and code < 0):
            return True
        sentence = self._sentence(code)
        # The owner may have ended since it was met: then only the sentence tells.
        if code and (owner.REFUSAL in sentence or self._owned()):
            self.trainer = None
            return False
        seconds = round(time.monotonic() - self._began, 1)
        _write_result(self.run, {"code": code, "sentence": sentence, "seconds": seconds})
        return True

    def _owned(self) -> bool:
        """Whether somebody else's trainer is at work; says so once of each."""
        mark = self._watch.owner()
        if mark is not None and mark.token != self._told:
            self._told = mark.token
            self._say(
                f"{named(self.run)}: process {mark.process} on {mark.host.split()[0]} has been "
                f"training there since {mark.since}; waiting for its end"
            )
        return mark is not None

    def _start(self) -> None:
        """In a session of its own: Ctrl-C reaches the run through us, and once."""
        if self._afresh and self.run.folder.exists():
            shutil.rmtree(self.run.folder)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        variables = dict(os.environ)
        if self._jobs > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, machine_cores() // self._jobs)))
        self._began = time.monotonic()
        with open(self.run.folder / LOG, "ab") as log:
            self._log_before = os.fstat(log.fileno()).st_size
            self.trainer = subprocess.Popen(
                [sys.executable, "-m", "fastmoco.train", *self.run.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def _sentence(self, code: int) -> str:
        """What the trainer said of its end; lives of the run before it do not count."""
        if code <= 0:
            return f"killed by signal {-code}" if code else ""
        with open(self.run.folder / LOG, "rb") as log:
            log.seek(self._log_before)
            lines = log.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        told = next((line for line in reversed(lines) if line.startswith("fastmoco: ")), last)
        return told.removeprefix("fastmoco: ")


def _end(places: Sequence[_Place], how: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """End our trainers in this way, and wait until they have."""
    trainers = [place.trainer for place in places if place.trainer is not None]
    for trainer in trainers:
        how(trainer)
    for trainer in trainers:
        trainer.wait()


def _write_result(run: Run, result: dict[str, object]) -> None:
    row = json.dumps({**result, "command": run.command(), **environment()}) + "\n"
    durable.replace(run.folder / RESULT, lambda partial: partial.write_text(row, encoding="utf-8"))


def environment() -> dict[str, object]:
    """Versions, processor and date, as they belong to every number that is kept."""
    names = (line.split(":")[1].strip() for line in processor.lines() if "model name" in line)
    return {
        "fastmoco": __version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "processor": f"{machine_cores()} cores, {next(names, platform.machine())}",
        "extension": processor.best(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _told(run: Run) -> str:
    result = run.ended() or {}
    how = f"FAILED: {result.get('sentence')}" if result.get("code") else "done"
    return f"{named(run)}: {how} ({result.get('seconds')} s)"


def named(run: Run) -> str:
    """Of a run, as lines about it begin."""
    return f"{run.folder.parent.name}/{run.folder.name}"
