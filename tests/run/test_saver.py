"""When a run saves, what it does meanwhile, and what it says where it cannot."""

from __future__ import annotations

import copy
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.run import checkpoint, directory
from fastmoco.weights import files
from tests.support.ranks import Ranks
from tests.support.runs.narrow import build, config, resume
from tests.support.tiny import ONE


def saver(folder: Path, **run: Any) -> checkpoint.Saver:
    settings = config(folder)
    settings = replace(settings, run=replace(settings.run, **run))
    return checkpoint.Saver(build(folder), settings, ONE, per_epoch=10)


def test_a_checkpoint_that_failed_is_due_again_once_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(tmp_path, checkpoint_every=1)
    assert one.save_if_due(9) == ""
    assert not files.checkpoints(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with one:
        assert one.save_if_due(10) == ""
    monkeypatch.undo()
    with one:
        assert "free some" in one.save_if_due(13)
    assert one.save_if_due(14) == ""
    assert [files.steps_in(path) for path in files.checkpoints(tmp_path)] == [13]


class SlowDisk:
    """`torch.save` that waits for `go`, and counts how many are under way at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.at_once = self.most = 0
        self._save = torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content: object, opened: BinaryIO) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.begun.set()
        assert self.go.wait(300)
        self._save(content, opened)
        self.at_once -= 1


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, step, disk = config(tmp_path), build(tmp_path, seed=1), SlowDisk(monkeypatch)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    step([Batch(images, images)], 0)
    state, momentum = copy.deepcopy((step.moco.state_dict(), step.optimizer.state_dict()["state"]))
    with checkpoint.Saver(step, settings, ONE, per_epoch=10) as one:
        assert one.save_if_due(1, overdue=True) == ""
        assert disk.begun.wait(300)
        step([Batch(images, images)], 1)  # before a byte is written
        disk.go.set()
    again = build(tmp_path, seed=2)
    assert resume(tmp_path, again).step == 1
    for name, tensor in again.moco.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    kept = again.optimizer.state_dict()["state"]
    for index, entry in momentum.items():
        assert torch.equal(kept[index]["momentum_buffer"], entry["momentum_buffer"])
    assert not torch.equal(step.moco.queue, again.moco.queue)


def test_one_checkpoint_at_a_time_and_the_last_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, disk = saver(tmp_path, checkpoint_minutes=1e-9), SlowDisk(monkeypatch)
    assert one.overdue()
    one.save_if_due(1, overdue=True)
    assert disk.begun.wait(300)
    assert not one.overdue()  # the clock asks for no other meanwhile
    assert one.save_if_due(2) == ""  # nor does this wait
    threading.Timer(0.2, disk.go.set).start()
    one.save_if_due(10)
    one.save_if_due(11, end=True)
    assert disk.most == 1
    assert [files.steps_in(path) for path in files.checkpoints(tmp_path)] == [11, 10]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_second_signal_ends_a_write_and_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(checkpoint, "LAST_S", 0.0)
    one, disk = saver(tmp_path), SlowDisk(monkeypatch)

    def interrupted() -> None:
        with one:
            one.save_if_due(10)
            assert disk.begun.wait(300)
            assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert not list(tmp_path.iterdir())
    disk.go.set()  # the process has not ended after all: what comes then is no checkpoint either
    (thread,) = [t for t in threading.enumerate() if t.name == "checkpoint"]
    thread.join()
    assert not list(tmp_path.iterdir())


def test_the_next_start_sweeps_what_a_killed_write_left(tmp_path: Path) -> None:
    settings = config(tmp_path / "run")
    left = tmp_path / "run" / ".checkpoint_0001_step00000010.pth.tar.4711"
    left.parent.mkdir()
    left.write_bytes(b"half")
    with directory.claimed(settings, enabled=True):
        assert not left.exists()


def outcomes(world: World, folder: str, free: int) -> list[str]:
    settings, step = config(Path(folder)), build(Path(folder))
    real = shutil.disk_usage
    shutil.disk_usage = lambda _: SimpleNamespace(free=free)  # type: ignore[assignment, return-value]
    try:
        with checkpoint.Saver(step, settings, world, per_epoch=10) as one:
            said = one.save_if_due(10)
        with one:
            return [said, one.save_if_due(10)]
    finally:
        shutil.disk_usage = real


def test_every_rank_learns_what_became_of_a_write(two_ranks: Ranks, tmp_path: Path) -> None:
    for first_said, then in two_ranks.run(outcomes, str(tmp_path), 0):
        assert (first_said, "free some" in then) == ("", True)


def test_the_end_of_a_run_is_not_called_saved_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(tmp_path)
    assert one.save_if_due(4, end=True) == ""
    pauses: list[float] = []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(checkpoint.NotSavedError, match="step00000004"):
        one.save_if_due(7, end=True)
    assert len(pauses) == 3


def test_ends_of_every_nth_epoch_stay(tmp_path: Path) -> None:
    one = saver(tmp_path, keep_checkpoints=1, keep_every=2)
    with one:
        for done in (10, 15, 20, 25, 28, 30, 40, 44):
            one.save_if_due(done, overdue=True)
    assert [files.steps_in(path) for path in files.checkpoints(tmp_path)] == [44, 40, 20]
