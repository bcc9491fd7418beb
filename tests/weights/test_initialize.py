"""`model.init_from` and `run.resume` of a foreign file, in the step and in a whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from fastmoco.config import Config, ConfigError
from fastmoco.method.step import Step
from fastmoco.train import main
from fastmoco.weights.initialize import start_from
from fastmoco.weights.read import read

State = dict[str, Tensor]
TINY = [
    *("--data.source=synthetic", "--data.synthetic_samples=16", "--augment.image_size=32"),
    *("--model.arch=resnet18", "--model.dim=8", "--moco.queue_size=40", "--moco.bn_group_size=4"),
    *("--optim.global_batch_size=8", "--optim.epochs=2", "--run.precision=fp32"),
    *("--run.device=cpu", "--run.log_every=1"),
]


def starting(config: Config, path: Path, **model: Any) -> Config:
    return replace(config, model=replace(config.model, init_from=str(path), **model))


def assert_same(found: State, wanted: State) -> None:
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def test_both_encoders_start_from_a_trunk(
    config: Config, new_step: Callable[..., Step], trunk: State, tmp_path: Path
) -> None:
    torch.save(trunk, tmp_path / "a.pth")
    moco = new_step().moco
    before = {name: tensor.clone() for name, tensor in moco.state_dict().items()}
    line = start_from(starting(config, tmp_path / "a.pth"), moco)
    assert "without its head" in line
    assert_same(moco.encoder_q.state_dict(), trunk)
    assert_same(moco.encoder_k.state_dict(), moco.encoder_q.state_dict())
    random = {n: t for n, t in before.items() if n.startswith("encoder_q.fc.")}
    assert_same(moco.state_dict(), {**random, "queue": before["queue"]})


def test_a_head_is_taken_over_where_it_fits(
    config: Config, new_step: Callable[..., Step], run: Path
) -> None:
    weights = read(run)
    moco = new_step().moco
    assert "without its head" not in start_from(starting(config, run), moco)
    for encoder in (moco.encoder_q, moco.encoder_k):
        assert_same(encoder.state_dict(), {**weights.trunk, **weights.head})
    for other in ({"dim": 16}, {"head": "linear"}):
        settings = starting(config, run, **other)
        moco = new_step(settings).moco
        head = {n: t.clone() for n, t in moco.encoder_q.state_dict().items() if "fc." in n}
        assert "without its head" in start_from(settings, moco)
        assert_same(moco.encoder_k.state_dict(), {**weights.trunk, **head})


def test_another_architecture_and_half_an_encoder_are_refused(
    config: Config, new_step: Callable[..., Step], run: Path, trunk: State, tmp_path: Path
) -> None:
    moco = new_step().moco
    before = {name: tensor.clone() for name, tensor in moco.state_dict().items()}
    for other in ({"arch": "resnet34"}, {"stem": "cifar"}, {"width": 0.5}):
        with pytest.raises(ConfigError, match=r"resnet18 with the imagenet stem, but this run"):
            start_from(starting(config, run, **other), moco)
    half = {n: t for n, t in trunk.items() if not n.startswith("layer4")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(ConfigError, match=r"missing: layer4\.0\.conv1\.weight"):
        start_from(starting(config, tmp_path / "half.pth"), moco)
    assert_same(moco.state_dict(), before)


def state(folder: Path) -> State:
    found: State = torch.load(folder / "latest.pth.tar", weights_only=True)["state_dict"]
    return found


def test_a_run_starts_from_a_file_and_resumes_without_it(
    trunk: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of 0 the weights stay those of the file; its end exports the trunk."""
    file, run = tmp_path / "a.pth", tmp_path / "run"
    torch.save(trunk, file)
    arguments = [*TINY, f"--run.dir={run}", f"--model.init_from={file}", "--optim.lr=0"]
    assert main([*arguments, "--run.max_steps=1"]) == 0
    printed = capfd.readouterr().out
    assert "start as resnet18 with the imagenet stem" in printed
    weights = {n: t for n, t in trunk.items() if n.endswith(("weight", "bias"))}
    assert_same({n.removeprefix("module.encoder_q."): t for n, t in state(run).items()}, weights)
    file.unlink()
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "model.load_state_dict(torch.load(" in printed
    exported, trained = read(run / "encoder.safetensors"), read(run)
    assert exported.epoch == 2
    assert_same(exported.trunk, trained.trunk)
    model = resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(torch.load(run / "encoder.pth", weights_only=True))
    assert_same(model.state_dict(), trained.trunk)
    other = [*TINY, f"--run.dir={tmp_path / 'other'}", f"--model.init_from={file}"]
    assert main(other) == 2
    assert "does not exist" in capfd.readouterr().err


def test_a_run_goes_on_from_an_official_epoch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of 2 epochs of 2 steps the official file has done one; a second start uses our own."""
    first, run = tmp_path / "first", tmp_path / "run"
    assert main([*TINY, f"--run.dir={first}", "--run.max_steps=2"]) == 0
    content = torch.load(first / "latest.pth.tar", weights_only=True)
    del content["fastmoco"]
    official = tmp_path / "checkpoint_0000.pth.tar"
    torch.save(content, official)
    arguments = [*TINY, f"--run.dir={run}", f"--run.resume={official}"]
    assert main([*arguments, "--run.max_steps=3"]) == 0
    assert "resumed   after step 2 (epoch 1.00)" in capfd.readouterr().out
    assert main(arguments) == 0
    assert "resumed   after step 3" in capfd.readouterr().out
    assert int(state(run)["module.queue_ptr"]) == 4 * 8
