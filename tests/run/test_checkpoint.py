"""Checkpoints: what the official scripts find in them, and what a crash leaves behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from fastmoco.config import Config, ConfigError, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from fastmoco.run import checkpoint
from tests.support.ranks import Ranks

ONE = World(0, 0, 1, torch.device("cpu"), "none")


def config(folder: Path, seed: int = 0) -> Config:
    return Config(
        run=RunConfig(dir=str(folder), seed=seed, keep_checkpoints=2),
        model=ModelConfig(arch="resnet18", head="mlp", dim=8),
        moco=MocoConfig(queue_size=40, bn_group_size=4),
        optim=OptimConfig(global_batch_size=8),
    )


def build(folder: Path, seed: int = 0) -> Step:
    settings = config(folder, seed)
    return build_step(settings, build_moco(settings, 4, ONE.device), ONE, compile_encoders=False)


def save(folder: Path, step: Step, steps: int) -> None:
    settings = config(folder)
    checkpoint.save(folder, step, steps=steps, epoch=steps // 10, config=settings, world=ONE)


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
    save(tmp_path, build(tmp_path), 10)
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
    path = checkpoint.find(config(tmp_path))
    assert path is not None
    assert checkpoint.resume(path, second, config(tmp_path), 10).step == 1
    for name, tensor in first.moco.state_dict().items():
        assert torch.equal(second.moco.state_dict()[name], tensor), name
    assert int(second.moco.queue_ptr) == 8
    mine, theirs = first.optimizer.state_dict(), second.optimizer.state_dict()
    for index, buffers in mine["state"].items():
        assert torch.equal(theirs["state"][index]["momentum_buffer"], buffers["momentum_buffer"])


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


def test_a_crash_while_writing_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = build(tmp_path)
    save(tmp_path, step, 1)

    def die(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, step, 2)
    monkeypatch.undo()
    latest = tmp_path / "latest.pth.tar"
    assert checkpoint.resume(latest, build(tmp_path), config(tmp_path), 10).step == 1


def statistics_after_save(world: World, folder: str) -> tuple[list[float], float]:
    """Every rank starts with running means of its own rank number."""
    settings = config(Path(folder))
    moco = build_moco(settings, 4, world.device)
    step = build_step(settings, moco, world, compile_encoders=False)
    for buffer in moco.running_statistics():
        buffer.fill_(float(world.rank))
    checkpoint.save(Path(folder), step, steps=1, epoch=0, config=settings, world=world)
    state = torch.load(Path(folder) / "latest.pth.tar", weights_only=True)["state_dict"]
    ours = {float(b.mean()) for b in moco.running_statistics()}
    return sorted(ours), float(state["module.encoder_q.bn1.running_var"].mean())


def test_running_statistics_are_averaged_over_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(statistics_after_save, str(tmp_path)) == [([0.5], 0.5), ([0.5], 0.5)]


@pytest.mark.parametrize("links", [True, False])
def test_latest_is_a_link_or_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Both forms lead to the newest file, and a run resumes from either."""
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(1314, "A required privilege is not held by the client")

        monkeypatch.setattr(os, "symlink", refuse)
    assert checkpoint.latest(tmp_path) is None
    step = build(tmp_path)
    for steps in (1, 2):
        save(tmp_path, step, steps)
    pointer = tmp_path / "latest.pth.tar"
    assert pointer.is_symlink() == links
    newest = checkpoint.find(config(tmp_path))
    assert newest is not None
    assert newest.name == "checkpoint_0000_step00000002.pth.tar"
    assert checkpoint.resume(newest, build(tmp_path), config(tmp_path), 10).step == 2
    named = replace(config(tmp_path), run=replace(config(tmp_path).run, resume=str(pointer)))
    assert checkpoint.find(named) == newest
    newest.unlink()
    with pytest.raises(ConfigError, match=r"step00000002\.pth\.tar, which is gone"):
        checkpoint.find(config(tmp_path))
