"""What safety costs: who saves when, and what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import saving
from fastmoco.config import dump, parse
from fastmoco.run import checkpoint

SMALL = [
    *("--data.source=synthetic", "--augment.image_size=16", "--model.arch=resnet18"),
    *("--model.stem=cifar", "--model.width=0.125", "--model.dim=8", "--moco.queue_size=16"),
    *("--optim.global_batch_size=4", "--moco.bn_group_size=2", "--run.device=cpu"),
]


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4]), (0, [])])
def test_a_contestant_saves_after_every_so_many_steps(
    monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    saved: list[int] = []
    real = checkpoint.Saver.save_if_due

    def spy(saver: checkpoint.Saver, done: int, *, overdue: bool = False, end: bool = False) -> str:
        folder = Path(saver._config.run.dir)
        saved.append(done)
        said = real(saver, done, overdue=overdue, end=end)
        assert folder.is_dir()
        return said

    monkeypatch.setattr(checkpoint.Saver, "save_if_due", spy)
    contestant = saving.step(dump(parse(SMALL)), every)
    contestant.run(5)
    contestant.close()
    assert saved == steps
