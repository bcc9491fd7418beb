"""Says which stage of a run has been silent for how long; ends nothing.

A thread looks now and then at what the others are doing, so that the loop marks nothing and pays
nothing. Limits that end a run are elsewhere: `run.timeout_s` for collectives.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from fastmoco.machine.ranks import World

FIRST_S = 60.0
"""Seconds of silence until the first sentence; the next ones come after twice the time each."""
LOOK_S = 5.0
_CHECKPOINT = "checkpoint"


class Stage(NamedTuple):
    """Code whose presence on the stack tells what a thread is about, innermost first."""

    file: str
    function: str
    """Any of the file where it is empty."""
    words: str
    patience: float = 1.0
    """In units of `FIRST_S`: some stages take long in healthy runs."""


STAGES = (
    Stage("machine/collectives.py", "", "waiting for other ranks in a collective"),
    Stage("data/loader.py", "batches", "waiting for images"),
    Stage("run/metrics.py", "flush", "waiting for the device to finish its steps"),
    Stage("evaluate/monitor.py", "", "in kNN", 10.0),
    Stage("run/checkpoint.py", "", "writing a checkpoint", 5.0),
    Stage("method/step.py", "", "in the training step"),
    Stage("method/compiled_step.py", "", "in the training step"),
    Stage("method/end_to_end.py", "", "in the training step"),
    Stage("method/memory_bank.py", "", "in the training step"),
)
COMPILES = 5.0
"""Patience with the first step, which compiles."""


def stage_of(frame: FrameType | None) -> Stage:
    """The stage that a thread is in, from its innermost frame outwards."""
    place = "starting"
    while frame is not None:
        file, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        for stage in STAGES:
            if file.endswith(f"fastmoco/{stage.file}") and stage.function in ("", function):
                return stage
        if "fastmoco/" in file and place == "starting":
            place = f"in {function} of {file.rpartition('/')[2]}"
        frame = frame.f_back
    return Stage("", "", place)


@dataclass
class _Silence:
    """Of one thread: what it does, since when, and after how long that is told next."""

    stage: Stage
    done: int
    since: float
    told_after: float


class Watchdog:
    """While entered, a thread tells of silence on this rank; on leaving it ends.

    `steps_done` counts the steps of the run, each of which breaks the silence.
    """

    def __init__(
        self,
        world: World,
        steps_done: Callable[[], int],
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._world, self._steps_done, self._say = world, steps_done, say
        self._start = steps_done()
        self._ended = threading.Event()
        self._silences: dict[int, _Silence] = {}
        self._main = threading.get_ident()

    def __enter__(self) -> Watchdog:
        self._start, self._main = self._steps_done(), threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Look at the thread of the loop and at one that writes a checkpoint; `now` in seconds."""
        frames, done = sys._current_frames(), self._steps_done()
        writers = [t.ident for t in threading.enumerate() if t.name == _CHECKPOINT and t.ident]
        for thread in (self._main, *writers):
            # Training goes on while a thread writes: steps do not break the silence of that.
            self._judge(thread, stage_of(frames.get(thread)), done * (thread == self._main), now)
        self._silences = {t: s for t, s in self._silences.items() if t in (self._main, *writers)}

    def _judge(self, thread: int, stage: Stage, done: int, now: float) -> None:
        found = self._silences.get(thread)
        if found is None or (found.stage, found.done) != (stage, done):
            compiles = stage.words.endswith("step") and done == self._start
            patience = max(stage.patience, COMPILES if compiles else 0.0)
            self._silences[thread] = _Silence(stage, done, now, patience * FIRST_S)
        elif now - found.since >= found.told_after:
            found.told_after *= 2
            rank, size, step = self._world.rank, self._world.size, self._steps_done() + 1
            self._say(
                f"fastmoco: rank {rank} of {size}, step {step}: {stage.words} for "
                f"{now - found.since:.0f} s."
            )
