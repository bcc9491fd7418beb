"""Checkpoints: what the official scripts find in them, and what a crash leaves behind."""

from __future__ import annotations

import errno
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, Literal

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from fastmoco.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    RunConfig,
    dump,
)
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from fastmoco.run import resuming
from fastmoco.weights import files
from tests.support.ranks import Ranks
from tests.support.runs import saved
from tests.support.runs.narrow import build, built, config, resume
from tests.support.tiny import ONE


def save(folder: Path, step: Step, steps: int) -> str:
    settings = config(folder)
    return saved.save(folder, step, steps=steps, epoch=steps // 10, config=settings, world=ONE)


def test_file_is_the_official_format(tmp_path: Path) -> None:
    step = build(tmp_path)
    save(tmp_path, step, 10)
    content = torch.load(tmp_path / "checkpoint_0001_step00000010.pth.tar", weights_only=True)
    assert (content["epoch"], content["arch"]) == (1, "resnet18")
    names = list(content["state_dict"])
    assert names[:3] == ["module.queue", "module.queue_ptr", "module.encoder_q.conv1.weight"]
    queue = content["state_dict"]["module.queue"]
    assert queue.shape == (8, 40)
    assert torch.equal(queue, step.moco.queue.T)
    assert content["state_dict"]["module.queue_ptr"].dtype == torch.int64
    assert all(t.is_contiguous() for t in content["state_dict"].values())


def test_the_official_linear_evaluation_reads_it(tmp_path: Path) -> None:
    """As that script does: encoder_q without its head; only the classifier may be missing."""
    settings = replace(config(tmp_path), model=ModelConfig(arch="resnet18", dim=8))
    moco = build_moco(settings, 4, ONE.device)
    step = build_step(settings, moco, ONE, compile_encoders=False)
    saved.save(tmp_path, step, steps=10, epoch=1, config=settings, world=ONE)
    state = torch.load(tmp_path / "latest.pth.tar", weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    trunk = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.startswith(prefix + "fc")
    }
    missing, unexpected = resnet18().load_state_dict(trunk, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected


def test_resume_restores_everything(tmp_path: Path) -> None:
    first = build(tmp_path, seed=1)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    views = Batch(images, images)
    first([views], 0)
    save(tmp_path, first, 1)
    second = build(tmp_path, seed=2)
    assert resume(tmp_path, second).step == 1
    for name, tensor in first.moco.state_dict().items():
        assert torch.equal(second.moco.state_dict()[name], tensor), name
    assert int(second.moco.queue_ptr) == 8
    mine, theirs = first.optimizer.state_dict(), second.optimizer.state_dict()
    for index, buffers in mine["state"].items():
        assert torch.equal(theirs["state"][index]["momentum_buffer"], buffers["momentum_buffer"])


@pytest.mark.parametrize("name", ["sgd_ema", "sgd", "lars"])
def test_settings_of_the_optimizer_are_those_of_the_run_that_goes_on(
    tmp_path: Path, name: Literal["sgd_ema", "sgd", "lars"]
) -> None:
    """`run.resume_changes allow` says that they changed, and so they have."""
    then = replace(config(tmp_path), optim=OptimConfig(name=name, momentum=0.9, weight_decay=1e-4))
    step = built(then)
    saved.save(tmp_path, step, steps=10, epoch=1, config=then, world=ONE)
    optim = replace(then.optim, momentum=0.5, weight_decay=0.01)
    now = replace(then, optim=optim, run=replace(then.run, resume_changes="allow"))
    again = built(now)
    resuming.resume(resuming.find(now, ONE), again, now, 10, ONE)
    (group,) = again.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)


def test_fp16_goes_on_from_a_checkpoint_without_a_gradient_scale(tmp_path: Path) -> None:
    first = build(tmp_path, seed=1)
    save(tmp_path, first, 10)
    half = replace(config(tmp_path).run, precision="fp16", resume_changes="allow")
    now = replace(config(tmp_path), run=half)
    again = built(now)
    before = again.scaler.state_dict()
    assert resuming.resume(resuming.find(now, ONE), again, now, 10, ONE).step == 10
    assert again.scaler.state_dict() == before
    assert torch.equal(again.moco.queue, first.moco.queue)


def test_keeps_the_last_n_by_step_not_by_name(tmp_path: Path) -> None:
    step = build(tmp_path)
    for steps in (99_999_999, 5, 100_000_000):
        save(tmp_path, step, steps)
    kept = sorted(p.name for p in tmp_path.glob("checkpoint_*"))
    assert kept == [
        "checkpoint_10000000_step100000000.pth.tar",
        "checkpoint_9999999_step99999999.pth.tar",
    ]
    assert (tmp_path / "latest.pth.tar").resolve().name == kept[0]


def test_a_write_that_fails_leaves_the_last_good_checkpoint_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = build(tmp_path)
    assert save(tmp_path, step, 1) == ""
    before = sorted(path.name for path in tmp_path.iterdir())

    def die(content: object, opened: BinaryIO) -> None:
        opened.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", die)
    assert "No space left on device" in save(tmp_path, step, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert resume(tmp_path, build(tmp_path)).step == 1


def test_nothing_is_written_where_it_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = build(tmp_path)
    save(tmp_path, step, 1)
    size = (tmp_path / "latest.pth.tar").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size // 2))
    assert re.search(r"needs \d+ MB .* has \d+ MB left", save(tmp_path, step, 2))
    assert [path.name for path in files.checkpoints(tmp_path)] == [
        "checkpoint_0000_step00000001.pth.tar"
    ]


@pytest.mark.parametrize("kind", ["torn", "flipped", "empty", "gone"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, kind: str) -> None:
    step = build(tmp_path)
    for steps in (1, 2):
        save(tmp_path, step, steps)
    newest = files.checkpoints(tmp_path)[0]
    data = bytearray(newest.read_bytes())
    if kind == "gone":
        newest.unlink()
    elif kind == "flipped":
        data[len(data) // 2] ^= 4
        newest.write_bytes(data)
    else:
        newest.write_bytes(data[: len(data) // 2] if kind == "torn" else b"")
    resumed = resume(tmp_path, build(tmp_path))
    assert resumed.step == 1
    (note,) = resumed.notes
    assert newest.name in note
    assert "goes on from checkpoint_0000_step00000001" in note
    assert not newest.exists()  # a higher number would make retention keep it and drop good ones
    save(tmp_path, step, 2)
    assert resume(tmp_path, build(tmp_path)).step == 2


def test_nothing_readable_is_refused_and_not_started_afresh(tmp_path: Path) -> None:
    save(tmp_path, build(tmp_path), 1)
    files.checkpoints(tmp_path)[0].write_bytes(b"half")
    with pytest.raises(ConfigError, match="None of the 1 checkpoints"):
        resuming.find(config(tmp_path), ONE)
    with pytest.raises(ConfigError, match="is gone, and no other checkpoint"):
        resuming.find(config(tmp_path), ONE)  # its name now says that it is damaged


def rewritten(folder: Path, name: str, tensor: Tensor, *, checksums: bool = True) -> None:
    """The newest checkpoint with another tensor, as a sound file; older ones lack checksums."""
    path = files.checkpoints(folder)[0]
    content = torch.load(path, weights_only=True)
    content["state_dict"][name] = tensor
    if not checksums:
        del content["fastmoco"]["checksums"]
    torch.save(content, path)


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    save(tmp_path, build(tmp_path), 1)
    name = "module.encoder_q.layer1.0.bn1.weight"
    rewritten(tmp_path, name, torch.full((16,), 1.5))
    with pytest.raises(ConfigError, match=f"checksum is wrong of state_dict.{name}"):
        resuming.find(config(tmp_path), ONE)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("encoder_q.bn1.weight", torch.full((16,), math.nan), "not finite, in .*q.bn1.weight"),
        ("encoder_k.bn1.bias", torch.full((16,), math.inf), "not finite, in .*k.bn1.bias"),
        ("encoder_q.bn1.bias", torch.zeros(16).half(), r"q.bn1.bias \(16,\) float16 there"),
        ("encoder_q.bn1.bias", torch.zeros(32), r"q.bn1.bias \(32,\) there and \(16,\) now"),
        ("queue_ptr", torch.tensor([40]), "queue_ptr 40 is not in its 40 keys"),
    ],
)
def test_an_older_checkpoint_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, name: str, tensor: Tensor, words: str
) -> None:
    save(tmp_path, build(tmp_path), 1)
    rewritten(tmp_path, f"module.{name}", tensor, checksums=False)
    with pytest.raises(ConfigError, match=words):
        resume(tmp_path, build(tmp_path))


def test_a_flipped_bit_is_found_in_an_older_checkpoint_too(tmp_path: Path) -> None:
    save(tmp_path, build(tmp_path), 1)
    path = files.checkpoints(tmp_path)[0]
    content = torch.load(path, weights_only=True)
    del content["fastmoco"]["checksums"]
    torch.save(content, path)
    assert resume(tmp_path, build(tmp_path)).step == 1
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"checksum is wrong of .*/data/"):
        resuming.read(path)


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    step = build(tmp_path)
    with torch.no_grad():
        step.moco.encoder_q.get_parameter("bn1.bias")[3] = math.nan
    assert "module.encoder_q.bn1.bias" in save(tmp_path, step, 1)
    assert not files.checkpoints(tmp_path)


def statistics_after_save(world: World, folder: str) -> tuple[float, float, float]:
    """Every rank starts with running means of its own rank number: its own, saved, resumed."""
    settings = config(Path(folder))
    moco = build_moco(settings, 4, world.device)
    step = build_step(settings, moco, world, compile_encoders=False)
    for buffer in moco.running_statistics():
        buffer.fill_(float(world.rank))
    saved.save(Path(folder), step, steps=1, epoch=0, config=settings, world=world)
    own = float(moco.running_statistics()[0].mean())
    state = torch.load(Path(folder) / "latest.pth.tar", weights_only=True)["state_dict"]
    found = resuming.find(settings, world)
    resuming.resume(found, step, settings, 10, world)
    assert len({float(b.mean()) for b in moco.running_statistics()}) == 1
    resumed = float(moco.running_statistics()[0].mean())
    return own, float(state["module.encoder_q.bn1.running_var"].mean()), resumed


def test_running_statistics_are_saved_as_their_mean_and_resumed_by_rank(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """A checkpoint changes nothing, so a run with more of them ends in the same bits."""
    assert two_ranks.run(statistics_after_save, str(tmp_path)) == [(0, 0.5, 0), (1, 0.5, 1)]
    step = build(tmp_path)
    resume(tmp_path, step)
    assert {float(b.mean()) for b in step.moco.running_statistics()} == {0.5}


def see_different_folders(world: World, folder: str) -> str:
    mine = Path(folder) / (str(world.rank))
    mine.mkdir()
    if world.is_main:
        save(mine, build(mine), 1)
    try:
        resuming.find(config(mine), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_see_the_same_folder_say_so(two_ranks: Ranks, tmp_path: Path) -> None:
    for sentence in two_ranks.run(see_different_folders, str(tmp_path)):
        assert "Rank 1 sees 0 checkpoints" in sentence
        assert "all nodes share" in sentence


def test_a_start_looks_up_the_configuration_without_reading_the_tensors(tmp_path: Path) -> None:
    """A damaged tensor does not matter there, and `load` refuses it later."""
    save(tmp_path, build(tmp_path), 1)
    path = files.checkpoints(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert files.configuration_in(path) == dump(config(tmp_path))
    with pytest.raises(ConfigError, match="checksum"):
        files.load(path)
    path.write_bytes(b"half")
    assert files.configuration_in(path) is None
    torch.save({"state_dict": {}}, path)
    assert files.configuration_in(path) is None


@pytest.mark.parametrize("links", [True, False])
def test_latest_is_a_link_or_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Both forms lead to the newest file, and a run resumes from either."""
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(1314, "A required privilege is not held by the client")

        monkeypatch.setattr(os, "symlink", refuse)
    assert files.latest(tmp_path) is None
    step = build(tmp_path)
    for steps in (1, 2):
        save(tmp_path, step, steps)
    pointer = tmp_path / "latest.pth.tar"
    assert pointer.is_symlink() == links
    newest = files.latest(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint_0000_step00000002.pth.tar"
    assert files.pointed_at(tmp_path) == newest
    other = replace(config(tmp_path), run=RunConfig(dir=str(tmp_path / "o"), resume=str(pointer)))
    named = resuming.find(other, ONE)
    assert named is not None
    assert named.path == newest
    pointer.unlink()  # a tool that copies no links: the folder itself says which is the newest
    assert resume(tmp_path, build(tmp_path)).step == 2
    assert files.pointed_at(tmp_path) == newest


def test_a_run_that_is_complete_mends_a_pointer_that_lost_power(tmp_path: Path) -> None:
    """Such a run writes no checkpoint any more, and other programs read what the pointer names."""
    step = build(tmp_path)
    for steps in (1, 2):
        save(tmp_path, step, steps)
    older, newest = sorted(tmp_path.glob("checkpoint_*"))
    files.point_at(older)
    assert resume(tmp_path, build(tmp_path)).step == 2
    assert files.pointed_at(tmp_path) == newest
