"""What a run says when it is silent: which stage, for how long, on which rank."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastmoco
from fastmoco.config import parse
from fastmoco.data.backends.synthetic import SyntheticEngine
from fastmoco.data.batch import Batch
from fastmoco.machine import watchdog
from fastmoco.machine.ranks import World
from fastmoco.machine.watchdog import FIRST_S, STAGES, Stage, Watchdog
from fastmoco.train import Run
from tests.support.tiny import ONE

ROOM = Path(fastmoco.__file__).parent


def named(stage: Stage, inner: Callable[[], Any]) -> Callable[[], Any]:
    """A function that calls `inner`, with the file and the name that the stage is told by."""
    name = stage.function or "anything"
    space: dict[str, Any] = {"inner": inner}
    code = f"def {name}():\n    inner()\n"
    exec(compile(code, str(ROOM / stage.file), "exec"), space)
    found: Callable[[], Any] = space[name]
    return found


class Told:
    """A watchdog of the calling thread at times of our own."""

    def __init__(self, world: World = ONE) -> None:
        self.done, self.lines = 7, list[str]()
        self.dog = Watchdog(world, lambda: self.done, self.lines.append)
        self.dog._start = 0

    def at(self, now: float) -> list[str]:
        """What has been said by then."""
        self.dog.look(now)
        return self.lines


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.file)
def test_every_stage_is_told_after_its_time_and_then_at_twice_the_time(stage: Stage) -> None:
    told = Told(World(1, 1, 2, ONE.device, "gloo"))
    first = stage.patience * FIRST_S

    def silent() -> None:
        for now, count in ((0, 0), (0.9 * first, 0), (first, 1), (1.9 * first, 1), (2 * first, 2)):
            assert len(told.at(now)) == count
        assert len(told.at(3.9 * first)) == 2

    named(stage, silent)()
    assert told.lines[1] == (f"fastmoco: rank 1 of 2, step 8: {stage.words} for {2 * first:.0f} s.")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.file)
def test_stages_are_told_by_code_that_exists(stage: Stage) -> None:
    tree = ast.parse((ROOM / stage.file).read_text())
    functions = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert stage.function in ("", *functions)


def test_the_innermost_stage_counts_and_a_step_or_another_stage_breaks_the_silence() -> None:
    told = Told()
    in_step = next(s for s in STAGES if s.file == "method/step.py")
    collective = STAGES[0]
    named(in_step, named(collective, lambda: told.at(0)))()
    named(in_step, lambda: told.at(59))()  # the collective is over
    named(in_step, lambda: told.at(118))()
    told.done += 1
    named(in_step, lambda: told.at(130))()
    assert named(in_step, lambda: told.at(189))() is None
    assert told.lines == []
    named(in_step, named(collective, lambda: told.at(200)))()
    named(in_step, named(collective, lambda: told.at(261)))()
    assert told.lines == [
        "fastmoco: rank 0 of 1, step 9: waiting for other ranks in a collective for 61 s."
    ]


def test_the_first_step_may_compile() -> None:
    told, step = Told(), next(s for s in STAGES if s.file == "method/compiled_step.py")
    told.dog._start = told.done
    named(step, lambda: (told.at(0), told.at(4.9 * FIRST_S)))()
    assert told.lines == []
    named(step, lambda: told.at(5 * FIRST_S))()
    assert len(told.lines) == 1


def test_a_checkpoint_is_told_although_training_goes_on() -> None:
    told, begun, over = Told(), threading.Event(), threading.Event()
    stage = next(s for s in STAGES if s.file == "run/checkpoint.py")

    def write() -> None:
        begun.set()
        assert over.wait(300)

    thread = threading.Thread(target=named(stage, write), name="checkpoint")
    thread.start()
    assert begun.wait(300)
    for now in range(0, 310, 10):
        told.done += 1
        told.at(now)
    over.set()
    thread.join()
    assert told.lines == [
        f"fastmoco: rank 0 of 1, step {told.done + 1}: writing a checkpoint for 300 s."
    ]
    told.at(10_000)  # it has ended
    assert sum("checkpoint" in line for line in told.lines) == 1


def test_a_run_that_waits_for_images_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine gives the third batch only once the watchdog has spoken."""
    monkeypatch.setattr(watchdog, "FIRST_S", 0.0)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.01)
    draw: Callable[[SyntheticEngine], Batch] = SyntheticEngine.next
    said: list[str] = []

    def slow(engine: SyntheticEngine) -> Batch:
        while engine.micro_step == 2 and "waiting for images" not in (said or [""])[-1]:
            said.append(capfd.readouterr().err)
        return draw(engine)

    monkeypatch.setattr(SyntheticEngine, "next", slow)
    small = ["--data.source=synthetic", "--data.synthetic_samples=64", "--augment.image_size=16"]
    small += ["--model.stem=cifar", "--model.arch=resnet18", "--model.width=0.125"]
    small += ["--moco.queue_size=32", "--optim.global_batch_size=16", "--run.max_steps=3"]
    run = Run(parse([*small, f"--run.dir={tmp_path}", "--run.device=cpu"]), ONE)
    run.train()
    assert re.search(r"rank 0 of 1, step 3: waiting for images for \d+ s\.", said[-1])
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
