"""What `run.precision` means on each kind of device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.config import Config, ConfigError, parse
from fastmoco.machine.precision import Precision, choose_precision
from fastmoco.machine.ranks import World, start
from fastmoco.method.agreement import require_one_precision
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from fastmoco.run import resuming
from fastmoco_kernels import processor
from tests.support.ranks import Ranks
from tests.support.runs.saved import save
from tests.support.tiny import ONE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAPPHIRE_RAPIDS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}
ZEN5 = {"avx2", "avx512f", "avx512_bf16", "avx_vnni"}
SKYLAKE = {"avx2", "avx512f"}
MILAN = {"avx2"}
ONE_CHIP = {"asimd", "bf16"}  # ARM, whose bf16 nobody has measured here


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SAPPHIRE_RAPIDS, "bf16"),
        (ZEN5, "bf16"),
        (SKYLAKE, "fp32"),
        (MILAN, "fp32"),
        (ONE_CHIP, "fp32"),
        (set(), "fp32"),
    ],
)
def test_auto_on_a_processor(
    flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(processor.CAP, raising=False)
    monkeypatch.setattr(processor, "_found", lambda: frozenset(flags))
    chosen = choose_precision("auto", CPU)
    assert chosen.name == expected
    assert processor.best() in chosen.why
    assert not chosen.warning


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_on_cuda(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = choose_precision("auto", CUDA)
    assert chosen.name == expected
    assert f"sm_{capability[0]}{capability[1]}" in chosen.why
    assert not chosen.warning


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("flags", [ZEN5, MILAN])
def test_what_is_asked_for_is_done_and_a_slow_choice_is_said(
    asked: str, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(processor.CAP, raising=False)
    monkeypatch.setattr(processor, "_found", lambda: frozenset(flags))
    chosen = choose_precision(asked, CPU)
    assert chosen.name == asked
    fast = asked == "fp32" or (asked == "bf16" and flags is ZEN5)
    assert bool(chosen.warning) != fast
    assert fast or "8 times" in chosen.warning


def test_bf16_on_an_old_gpu_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "sm_70" in choose_precision("bf16", CUDA).warning
    assert not choose_precision("fp16", CUDA).warning


def test_the_cap_takes_bf16_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_found", lambda: frozenset(SAPPHIRE_RAPIDS))
    monkeypatch.setenv(processor.CAP, "avx2")
    chosen = choose_precision("auto", CPU)
    assert chosen.name == "fp32"
    assert "avx2" in chosen.why


def of_this_rank(world: World) -> str:
    """The older GPU is on rank 1."""
    names = ("bf16", "fp16")
    try:
        require_one_precision(Precision(names[world.rank], "auto"), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_unlike_devices_are_refused_on_every_rank(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(of_this_rank)
    assert first == second
    assert "bf16 on some ranks and fp16 on others" in first


def config(folder: Path, precision: str) -> Config:
    return parse(
        [
            *("--run.dir", str(folder), "--run.precision", precision, "--model.arch", "resnet18"),
            *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4"),
            *("--moco.queue_size", "64", "--augment.image_size", "32"),
        ]
    )


def build(settings: Config, flags: set[str], monkeypatch: pytest.MonkeyPatch) -> Step:
    monkeypatch.setattr(processor, "_found", lambda: frozenset(flags))
    world = start("cpu", 60)
    return build_step(settings, build_moco(settings, 4, CPU), world, compile_encoders=False)


def test_auto_that_means_another_type_on_resume_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(processor.CAP, raising=False)
    auto = config(tmp_path, "auto")
    saved = build(auto, ZEN5, monkeypatch)
    assert saved.precision.name == "bf16"
    save(tmp_path, saved, steps=3, epoch=0, config=auto, world=start("cpu", 60))
    found = resuming.read(tmp_path / "latest.pth.tar")
    same = resuming.resume(found, build(auto, ZEN5, monkeypatch), auto, 10, ONE)
    assert same == resuming.Resumed(3)
    other = resuming.resume(found, build(auto, MILAN, monkeypatch), auto, 10, ONE)
    assert other.step == 3
    (note,) = other.notes
    assert "trained in bf16 so far and goes on in fp32" in note


def test_the_field_as_written_belongs_to_the_identity_of_a_run(tmp_path: Path) -> None:
    auto, said = config(tmp_path, "auto"), config(tmp_path, "fp32")
    assert auto.identity()["run.precision"] == "auto"
    assert auto.identity() != said.identity()
    assert replace(said, run=auto.run).identity() == auto.identity()
