"""Runs whose loss or gradient is not finite: they stop with the data of the step, or go on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmoco.config import parse
from fastmoco.data.backends.synthetic import SyntheticEngine
from fastmoco.data.batch import Batch
from fastmoco.data.preview import __main__ as preview
from fastmoco.machine.ranks import World
from fastmoco.run.progress import DivergedError
from fastmoco.run.record import read_metrics
from fastmoco.train import Run, main
from fastmoco.weights import files
from tests.support.ranks import Ranks

SMALL = [
    *("--data.source=synthetic", "--data.synthetic_samples=80", "--augment.image_size=16"),
    *("--model.arch=resnet18", "--model.stem=cifar", "--model.width=0.125", "--model.dim=16"),
    *("--moco.queue_size=64", "--moco.bn_group_size=4", "--optim.global_batch_size=16"),
    *("--run.device=cpu", "--run.precision=fp32", "--run.log_every=4", "--optim.epochs=6"),
]
BAD = 9
"""A step after the first epoch, counted from 1."""


@pytest.fixture
def bad_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 9 gets an infinite pixel, as a loader with a fault would give it."""
    good: Callable[[SyntheticEngine], Batch] = SyntheticEngine.next

    def draw(engine: SyntheticEngine) -> Batch:
        batch = good(engine)
        im_q = batch.im_q.float()
        if engine.micro_step == BAD:
            im_q[-1, 0, 0, 0] = math.inf
        return Batch(im_q, batch.im_k, batch.replaced)

    monkeypatch.setattr(SyntheticEngine, "next", draw)


@pytest.mark.usefixtures("bad_pixel")
def test_a_run_stops_with_the_data_of_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*SMALL, f"--run.dir={folder}"]) == 1
    saved = folder / "not_finite_step00000009.json"
    told = capsys.readouterr().err
    assert told.startswith("fastmoco: The loss or its gradient is not finite in step 9 and in ")
    assert f"fastmoco preview --replay {saved} draws its batch" in told
    assert len(told.splitlines()) == 1
    # Of the end of the first epoch, and as it was written.
    assert [files.steps_in(path) for path in files.checkpoints(folder)] == [5]
    assert files.load(folder)["epoch"] == 1
    content = json.loads(saved.read_text())
    assert (content["epoch"], content["seed"]) == (1, 0)
    out = tmp_path / "batch.png"
    assert preview.main(["--replay", str(saved), "--out", str(out)]) == 0
    assert out.is_file()


@pytest.mark.usefixtures("bad_pixel")
def test_a_run_goes_on_without_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, f"--run.dir={tmp_path}", "--run.nonfinite=skip"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(warnings) == 1
    assert "in step 9: left out, as run.nonfinite says; fastmoco preview --replay" in warnings[0]
    losses = [r.values["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert all(math.isfinite(loss) for loss in losses)
    state = files.load(tmp_path)["state_dict"]
    assert int(state["module.queue_ptr"]) == 29 * 16 % 64  # 30 steps, of which one was not


def test_steps_that_are_all_bad_are_not_left_out_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first update ruins the weights, and all that follows is bad."""
    arguments = [*SMALL, f"--run.dir={tmp_path}", "--run.nonfinite=skip", "--optim.lr=1e30"]
    assert main(arguments) == 1
    assert re.search(r"the last 2\d of them in a row, so that", capsys.readouterr().err)


def stopped(world: World, folder: str) -> str:
    with pytest.raises(DivergedError) as caught:
        Run(parse([*SMALL, f"--run.dir={folder}", "--optim.lr=1e30"]), world).train()
    return str(caught.value)


def test_both_ranks_stop_with_the_same_sentence(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(stopped, str(tmp_path))
    assert first == second
    assert re.match(r"The loss or its gradient is not finite in step [23] and in \d more", first)
    assert list(tmp_path.glob("not_finite_step0000000[23].json"))
