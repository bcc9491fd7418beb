"""The full protocol: the same classifier as on stored features, resumed exactly, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmoco.config import ModelConfig
from fastmoco.evaluate import linear
from fastmoco.evaluate.frozen import FrozenTrunk, stored_features
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.linear_cached import Schedule, train_sweep
from fastmoco.evaluate.linear_protocol import Protocol, TrunkChangedError
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import build_encoder
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU, "none")
SCHEDULE = Schedule(epochs=3, batch_size=8, milestones=(2,), seed=5)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """16 training and 11 test images of two classes, and an encoder of random weights."""
    rng = np.random.default_rng(0)
    for name, count in (("train/a", 8), ("train/b", 8), ("test/a", 6), ("test/b", 5)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (36, 44, 3), dtype=np.uint8)
            pixels[..., 0] //= 1 + 3 * name.endswith("a")
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=1 / 8))
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    return tmp_path


def protocol(place: Path, out: str = "out", world: World = ALONE) -> Protocol:
    train, test = (LabelledImages(place / n, resize=36, image_size=32) for n in ("train", "test"))
    trunk = FrozenTrunk(place / "encoder.pth", CPU)
    return Protocol(trunk, train, test, SCHEDULE, lr=3.0, out=place / out, world=world, workers=1)


def test_it_is_the_cached_classifier_where_that_sees_the_same_crops(place: Path) -> None:
    one = protocol(place)
    result = one.run()
    crops = stored_features(one.trunk, one.train, place, device=CPU, crops=3, seed=5)
    many = train_sweep(
        crops, one.train.labels, classes=2, lr=[3.0], weight_decay=[0.0], schedule=SCHEDULE
    )
    torch.testing.assert_close(one.fc.weight.detach(), many.weight[0], rtol=1e-4, atol=1e-5)
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").open()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([3.0, 3.0, 0.3])
    assert result["val_top1"] == max(line["val_top1"] for line in lines)


def test_interrupted_and_started_again_it_ends_at_the_same_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = protocol(place, "whole")
    whole.run()
    first = protocol(place, "halves")
    validate, calls = first.validate, iter([False, True])

    def interrupted() -> tuple[float, float]:
        if next(calls):
            raise KeyboardInterrupt
        return validate()

    monkeypatch.setattr(first, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = protocol(place, "halves")
    second.run()
    assert torch.equal(whole.fc.weight, second.fc.weight)
    assert torch.equal(whole.fc.bias, second.fc.bias)
    assert len((place / "halves" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_trunk_that_changes_ends_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = protocol(place)
    step = one.step

    def touching(features: Tensor, labels: Tensor) -> Tensor:
        one.trunk.network.get_buffer("bn1.running_mean")[0] += 1e-6
        return step(features, labels)

    monkeypatch.setattr(one, "step", touching)
    with pytest.raises(TrunkChangedError, match="has changed"):
        one.run()


def on_ranks(world: World, place: str) -> tuple[Tensor, tuple[float, float]]:
    """Three steps on this rank's half of a batch, then validation of 11 images."""
    one = protocol(Path(place), "ranks", world)
    rows = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    for start in (0, 4, 8):
        images = one.train.load(start, start + 8)
        one.step(one.trunk(images[rows]), one.train.labels[start : start + 8][rows])
    return one.fc.weight.detach(), one.validate()


def test_two_ranks_learn_and_count_as_one_does(place: Path, two_ranks: Ranks) -> None:
    weight, counted = on_ranks(ALONE, str(place))
    for rank_weight, rank_counted in two_ranks.run(on_ranks, str(place)):
        torch.testing.assert_close(rank_weight, weight, rtol=1e-4, atol=1e-5)
        assert rank_counted == pytest.approx(counted)
    assert counted[0] * 11 == pytest.approx(round(counted[0] * 11))


def test_features_of_an_interrupted_computation_are_not_computed_again(place: Path) -> None:
    one = protocol(place)
    options: dict[str, Any] = {"device": CPU, "batch_size": 4}
    found = stored_features(one.trunk, one.train, place / "store", **options).clone()
    torch.testing.assert_close(found[0], one.trunk(one.train.load(0, 16)), rtol=1e-5, atol=1e-5)
    (file,), (note,) = (place / "store").glob("*.npy"), (place / "store").glob("*.json")
    stored = np.load(file, mmap_mode="r+")
    stored[0] = -1.0
    stored.flush()
    note.write_text(json.dumps({"batches": 2}))
    again = stored_features(one.trunk, one.train, place / "store", **options)
    assert (again[0, :8] == -1).all()
    assert torch.equal(again[0, 8:], found[0, 8:])


def test_the_command_prints_a_table_and_refuses_in_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    root = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place)]
    small = ["--image_size", "32", "--epochs", "2", "--labels", "6-per-class", "--cached"]
    assert linear.main([*root, *small, "--out", str(place / "o")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chosen") == 1
    assert len([x for x in printed.splitlines() if x.count("%") == 2]) == 30
    assert json.loads((place / "o" / "results.jsonl").read_text())["images"] == 12
    for arguments, part in (
        ([*root, "--labels", "9-per-class"], "has only 8"),
        ([*root, "--epochs", "0"], "--epochs is 0"),
        ([*root, "--lr", "-1"], "--lr is -1"),
        ([*root, "--lr", "1", "--cached"], "leave out --lr"),
        ([*root, "--crops", "2"], "--crops is for --cached"),
        (["--checkpoint", "nowhere", "--data.root", "x"], "nowhere does not exist"),
        ([*root[:2], "--data.root", str(place / "train")], "needs a folder train"),
    ):
        assert linear.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
