"""The data of one step, drawn again: the same bits that the loaders of all ranks gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config, ConfigError, parse
from fastmoco.data.batch import Batch
from fastmoco.data.loader import build_loader
from fastmoco.data.preview import __main__ as preview
from fastmoco.data.preview import replay
from fastmoco.method.shuffle_bn import build_shuffle
from tests.support.tiny import ONE

CPU = torch.device("cpu")


def settings(root: Path, run: Path, *more: str) -> Config:
    batch = ("--optim.global_batch_size=8", "--augment.image_size=32", "--optim.accumulate=2")
    sizes = ("--data.workers=1", "--run.device=cpu", "--optim.epochs=3", "--data.max_bad_share=0.1")
    return parse([f"--data.root={root}", f"--run.dir={run}", *batch, *sizes, *more])


def given(config: Config, step: int) -> tuple[list[Batch], Path]:
    """What two ranks got in a step, per micro-batch and rank, and the file that one saved."""
    batches: list[Batch] = []
    for rank in range(2):
        with build_loader(config, rank=rank, world_size=2, device=CPU) as loader:
            batches += list(loader.batches(step - 1, step))
            path = replay.save(Path(config.run.dir), config, loader, step, write=rank == 0)
    return batches, path


def test_the_batch_of_a_step_is_drawn_again_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    config = settings(photos, tmp_path)
    batches, path = given(config, 5)
    again = replay.batches(replay.read(path), CPU)
    assert len(again) == 2  # micro-batches
    for micro, batch in enumerate(again):
        both = [batches[rank * 2 + micro] for rank in range(2)]
        for name in ("im_q", "im_k"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(b, name) for b in both]))
        asked = np.concatenate([b.replaced[:, 0] for b in both])
        assert asked.tolist() == json.loads(path.read_text())["samples"][micro]
    assert not (tmp_path / "bad_samples.jsonl").exists()


def test_keys_that_the_loader_shuffled_stand_beside_their_queries(
    photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, tmp_path, "--optim.accumulate=1")
    rows = build_shuffle("loader", world=ONE, local=8, seed=config.run.seed).key_rows
    assert rows is not None
    with build_loader(config, device=CPU, key_rows=rows) as loader:
        (batch,) = loader.batches(2, 3)
        path = replay.save(tmp_path, config, loader, 3)
    (again,) = replay.batches(replay.read(path), CPU)
    assert torch.equal(again.im_k[rows(2)], batch.im_k)
    assert torch.equal(again.im_q, batch.im_q)


def test_other_images_are_refused(photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    _, path = given(settings(photos, tmp_path), 2)
    same = replay.batches(replay.read(path, [f"--data.root={moved}"]), CPU)
    assert len(same) == 2
    min(moved.rglob("*.jpg")).rename(moved / "zzz.jpg")
    with pytest.raises(ConfigError, match=r"are not those of step 2: set --data\.root"):
        replay.batches(replay.read(path, [f"--data.root={moved}"]), CPU)


def test_the_command_draws_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches, path = given(settings(photos, tmp_path), 2)
    out = tmp_path / "batch.png"
    assert preview.main(["--replay", str(path), "--out", str(out), "--samples", "6"]) == 0
    assert capsys.readouterr().out == f"{out}: 6 of the 8 samples of step 2\n"
    page, (gap, line) = np.asarray(Image.open(out)), (8, 14)
    # Four rows of micro-batch 0, of two ranks, and then micro-batch 1; drawn three times as large.
    views = torch.cat([batches[0].im_q, batches[2].im_q, batches[1].im_q]).numpy()
    for row, view in enumerate(views):
        top = 2 * gap + line + row * (96 + line + gap)
        assert np.array_equal(page[top : top + 96 : 3, gap : gap + 96 : 3], view)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"kind": "x"}', '{"kind": "fastmoco step 1", "step": "x"}', "\0"]
)
def test_another_file_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "step.json"
    path.write_text(text)
    assert preview.main(["--replay", str(path)]) == 2
    assert f"{path} is not the data of a step" in capsys.readouterr().err
    assert preview.main(["--replay", str(tmp_path / "none.json")]) == 2


def test_a_full_disk_is_no_error(photos: Path, tmp_path: Path) -> None:
    config = settings(photos, tmp_path)
    with build_loader(config, device=CPU) as loader:
        path = replay.save(tmp_path / "gone", config, loader, 2)
    assert not path.exists()
