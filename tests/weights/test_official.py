"""Our checkpoints in the official trainer, and its checkpoints in ours, against a restatement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from fastmoco.config import Config, ConfigError
from fastmoco.method.optim.update import lr_at, set_lr
from fastmoco.method.step import Step
from fastmoco.network.encoder import PIXEL_MEAN, PIXEL_STD
from fastmoco.run import resuming
from tests.support.tiny import ONE

PER_EPOCH = 6


def resume(path: Path, step: Step, config: Config) -> resuming.Resumed:
    return resuming.resume(resuming.read(path), step, config, PER_EPOCH, ONE)


class OfficialMoCo(nn.Module):
    """The official model of the v2 recipe in our own words: two encoders, and a queue (C, K)."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int, length: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.encoder_q = resnet18(num_classes=dim)
        self.encoder_q.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), self.encoder_q.fc)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, length), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        """The loss; moves encoder_k before it is used, and the queue after that."""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            both = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
            for slow, fast in both:
                slow.copy_(slow * self.momentum + fast * (1 - self.momentum))
            k = F.normalize(self.encoder_k(im_k), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1)
        place = int(self.queue_ptr)
        self.queue[:, place : place + len(k)] = k.T
        self.queue_ptr[0] = (place + len(k)) % self.queue.shape[1]
        return F.cross_entropy(logits / self.temperature, torch.zeros(len(q), dtype=torch.long))


class Wrapped(nn.Module):
    """Puts `module.` before every name, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class OfficialRun:
    """The official script around the model: one optimizer over everything, and its `--resume`."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        torch.manual_seed(seed)
        moco, optim = config.moco, config.optim
        self.base_lr, self.epochs = optim.lr, optim.epochs
        self.model = Wrapped(
            OfficialMoCo(config.model.dim, moco.queue_size, moco.momentum, moco.temperature)
        )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
        )
        self.start_epoch = 0

    def resume(self, path: Path) -> None:
        content = torch.load(path, weights_only=True)
        self.start_epoch = content["epoch"]
        self.model.load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(content["optimizer"])

    def save(self, path: Path, epoch: int) -> None:
        content = {
            "epoch": epoch + 1,
            "arch": "resnet18",
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, path)

    def train(self, views: Any, epoch: int) -> float:
        lr = self.base_lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        self.optimizer.param_groups[0]["lr"] = lr
        loss = self.model.module(normalized(views.im_q), normalized(views.im_k))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss)

    def momentum(self) -> dict[str, Tensor]:
        """Momentum by the name of its parameter."""
        named = self.model.module.named_parameters()
        return {n: self.optimizer.state[p]["momentum_buffer"] for n, p in named if "_q." in n}


def normalized(images: Tensor) -> Tensor:
    """uint8 (N, S, S, 3) to what torchvision's ToTensor and Normalize give."""
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


def our_momentum(step: Step) -> dict[str, Tensor]:
    named = step.moco.named_parameters()
    return {n: step.optimizer.state[p]["momentum_buffer"] for n, p in named if "_q." in n}


def our_model(step: Step) -> dict[str, Tensor]:
    state = step.moco.state_dict()
    return {**state, "queue": state["queue"].T}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Relative to the length of each tensor; two ways to sum in fp32 differ by 1e-6 or so."""
    assert ours.keys() == theirs.keys()
    far = {n: distance(ours[n], theirs[n]) for n in ours}
    assert max(far.values()) < 1e-3, {n: d for n, d in far.items() if d >= 1e-3}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6))


def train_ours(step: Step, config: Config, views: Any, number: int) -> float:
    set_lr(step.optimizer, lr_at(config, number // PER_EPOCH))
    return float(step([views], number).loss)


def test_the_official_resume_reads_our_checkpoint(
    config: Config,
    run: Path,
    new_step: Callable[..., Step],
    images: Callable[[int], Any],
    save: Callable[[Path, Step, int], Path],
) -> None:
    step = new_step()
    step([images(0)], 0)
    path = save(run, step, 3)
    official = OfficialRun(config, seed=9)
    assert len(official.optimizer.param_groups[0]["params"]) == 128
    official.resume(path)
    assert official.start_epoch == 3
    assert_equal(our_model(step), official.model.module.state_dict())
    assert_equal(our_momentum(step), official.momentum())
    assert all(t.is_contiguous() for t in official.momentum().values())
    assert math.isfinite(official.train(images(1), 3))


@pytest.fixture
def official_file(config: Config, images: Callable[[int], Any], tmp_path: Path) -> Path:
    """What the official trainer leaves after an epoch of two steps."""
    official = OfficialRun(config)
    for number in range(2):
        official.train(images(number), 0)
    official.save(tmp_path / "checkpoint_0000.pth.tar", 0)
    return tmp_path / "checkpoint_0000.pth.tar"


def test_an_official_run_goes_on_exactly(
    config: Config,
    official_file: Path,
    new_step: Callable[..., Step],
    images: Callable[[int], Any],
    save: Callable[[Path, Step, int], Path],
    tmp_path: Path,
) -> None:
    """Two more steps there and here: weights, BN statistics, queue and momentum stay together.

    Batches of 8 go round the queue of 40. A key encoder that misses one EMA would be far off.
    """
    official = OfficialRun(config, seed=1)
    official.resume(official_file)
    step = new_step()
    done = resume(official_file, step, config).step
    assert done == PER_EPOCH
    for number in (done, done + 1):
        theirs = official.train(images(number), number // PER_EPOCH)
        assert train_ours(step, config, images(number), number) == pytest.approx(theirs, rel=1e-4)
    # Ours has made the move of encoder_k that the official step makes at its beginning.
    state = official.model.module.state_dict()
    encoder_k = official.model.module.get_submodule("encoder_k")
    for name, tensor in encoder_k.named_parameters():
        fast = state[f"encoder_q.{name}"]
        state[f"encoder_k.{name}"] = tensor * config.moco.momentum + fast * (
            1 - config.moco.momentum
        )
    assert_close(our_model(step), state)
    assert_close(our_momentum(step), official.momentum())
    assert int(step.moco.queue_ptr) == 4 * 8

    # From here on it is a run of ours, resumed bit for bit.
    path = save(tmp_path, step, 1)
    again = new_step()
    resume(path, again, config)
    assert_equal(our_model(again), our_model(step))
    assert_equal(our_momentum(again), our_momentum(step))


def test_our_older_checkpoints_list_the_query_parameters_only(
    run: Path, config: Config, new_step: Callable[..., Step]
) -> None:
    content = torch.load(run / "latest.pth.tar", weights_only=True)
    group = content["optimizer"]["param_groups"][0]
    assert len(group["params"]) == 128
    group["params"] = group["params"][:64]
    del content["fastmoco"]["checksums"], content["fastmoco"]["running_statistics"]
    torch.save(content, run / "old.pth.tar")
    new, old = new_step(), new_step()
    for path, step in ((run / "latest.pth.tar", new), (run / "old.pth.tar", old)):
        assert resume(path, step, config).step == 12
    assert_equal(our_model(old), our_model(new))
    assert_equal(our_momentum(old), our_momentum(new))


def changed(path: Path, **entries: Any) -> Path:
    """A copy of the file with other entries; None removes one."""
    content = torch.load(path, weights_only=True) | entries
    torch.save({n: v for n, v in content.items() if v is not None}, path.parent / "changed.pth.tar")
    return path.parent / "changed.pth.tar"


def test_what_does_not_fit_is_refused_in_one_sentence(
    official_file: Path, config: Config, new_step: Callable[..., Step]
) -> None:
    step = new_step()
    state = torch.load(official_file, weights_only=True)["state_dict"]
    stripped = {n: t for n, t in state.items() if "encoder_q" in n}
    groups = {"state": {}, "param_groups": [{"params": list(range(7)), "momentum": 0.9}]}
    with pytest.raises(ConfigError, match=r"model\.init_from"):
        resume(changed(official_file, state_dict=stripped), step, config)
    with pytest.raises(ConfigError, match=r"model\.init_from"):
        resume(changed(official_file, optimizer=None), step, config)
    with pytest.raises(ConfigError, match=r"groups of \[7\] parameters"):
        resume(changed(official_file, optimizer=groups), step, config)
    other = replace(config, optim=replace(config.optim, weight_decay=0.0))
    with pytest.raises(ConfigError, match=r"optim\.weight_decay \(0\.0001 there, 0\.0 now\)"):
        resume(official_file, step, other)
    longer = replace(config, moco=replace(config.moco, queue_size=48))
    with pytest.raises(ConfigError, match=r"queue \(40, 8\) there and \(48, 8\) now"):
        resume(official_file, new_step(longer), longer)
    plain = replace(config, model=replace(config.model, head="linear"))
    with pytest.raises(ConfigError, match=r"lacks encoder_q\.fc\.weight"):
        resume(official_file, new_step(plain), plain)


def test_a_run_that_began_from_an_official_file_goes_on_from_its_own(
    official_file: Path, config: Config, run: Path, tmp_path: Path
) -> None:
    def found(folder: Path, resume: Path) -> Path | None:
        settings = replace(config.run, dir=str(folder), resume=str(resume))
        newest = resuming.find(replace(config, run=settings), ONE)
        return newest.path if newest else None

    assert found(tmp_path / "new", official_file) == official_file
    own = (run / "latest.pth.tar").resolve()
    assert found(run, official_file) == own
    assert found(run, own) == own
