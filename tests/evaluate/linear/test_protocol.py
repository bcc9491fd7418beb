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

from fastmoco.config import Config, ConfigError, ModelConfig, OptimConfig, RunConfig
from fastmoco.data.loader import make_plan
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.linear import __main__ as linear
from fastmoco.evaluate.linear.cached import Classifiers, Schedule, train_sweep
from fastmoco.evaluate.linear.frozen import CheckedTrunk, stored_features
from fastmoco.evaluate.linear.protocol import Protocol, TrunkChangedError
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import build_encoder
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU, "none")
# The last batch of an epoch of 16 images has 4.
SCHEDULE = Schedule(epochs=3, batch_size=6, milestones=(2,), seed=5)


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
    trunk = CheckedTrunk(place / "encoder.pth", CPU)
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


def test_what_the_sweep_chose_learns_again_from_all_images_as_the_protocol_does(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    models: list[Classifiers] = []

    def kept(*given: Any, **options: Any) -> Classifiers:
        models.append(train_sweep(*given, **options))
        return models[-1]

    monkeypatch.setattr(linear, "train_sweep", kept)
    root = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place), "--seed", "5"]
    root += ["--image_size", "32", "--epochs", "3", "--batch_size", "6", "--out", str(place / "o")]
    assert linear.main([*root, "--cached", "--crops", "3"]) == 0
    said = capsys.readouterr().out
    chosen = json.loads((place / "o" / "results.jsonl").read_text())
    pairs = {(chosen["lr"], chosen["weight_decay"]), (chosen["lr_without_decay"], 0.0)}
    assert said.count("learned again from all 16 images") == len(pairs)
    rate = str(chosen["lr_without_decay"])
    assert linear.main([*root, "--lr", rate, "--workers", "1"]) == 0
    fc = torch.load(place / "o" / "linear.pth.tar")["fc"]
    (again,) = models  # that of the sweep itself is not counted: it lacks the held-out images
    torch.testing.assert_close(again.weight[-1], fc["weight"], rtol=1e-4, atol=1e-5)
    last = json.loads((place / "o" / "metrics.jsonl").read_text().splitlines()[-1])
    assert chosen["val_top1_without_decay"] == last["val_top1"]


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


def test_the_same_number_of_other_images_is_another_classification(place: Path) -> None:
    protocol(place).run()
    (place / "train" / "a" / "7.png").rename(place / "train" / "a" / "8.png")
    with pytest.raises(ConfigError, match="choose another --out"):
        protocol(place).run()


def test_bad_images_are_counted_named_and_left_out(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    (place / "test" / "b" / "3.png").write_bytes(b"not a picture")
    (place / "train" / "a" / "2.png").write_bytes(b"not a picture")
    root = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place)]
    small = [*root, "--image_size", "32", "--epochs", "2"]
    for part in (["--workers", "1"], ["--cached", "--crops", "2"], ["--cached"]):
        out = place / f"out{len(part)}"
        assert linear.main([*small, *part, "--out", str(out)]) == 0
        warning = capsys.readouterr().err
        assert "1 of 11" in warning
        assert "test/b/3.png (not an image" in warning
        result = json.loads((out / "results.jsonl").read_text())
        # Ten test images count: the accuracy is a number of tenths.
        assert result["val_top1"] * 10 == pytest.approx(round(result["val_top1"] * 10))
        assert ("train/a/2.png" in warning) == ("--cached" in part)
    (first, _) = [json.loads(line) for line in (place / "out2" / "metrics.jsonl").open()]
    assert (first["bad_samples"], first["bad_test_images"]) == (1, 1)


def test_the_first_steps_are_those_of_torch_alone_in_float64(place: Path) -> None:
    one = protocol(place)
    images, labels = one.train.load(0, 6), one.train.labels[:6]
    features = one.trunk(images)
    alone = torch.nn.Linear(features.shape[1], 2, dtype=torch.float64)
    alone.load_state_dict(one.fc.state_dict())
    optimizer = torch.optim.SGD(alone.parameters(), 3.0, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(alone(features.double()), labels).backward()
        optimizer.step()
        one.step(features, labels, 6)
    torch.testing.assert_close(one.fc.weight.double(), alone.weight, rtol=1e-5, atol=1e-6)


def test_a_trunk_that_changes_ends_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = protocol(place)
    step = one.step

    def touching(features: Tensor, labels: Tensor, everyone: int) -> Tensor:
        one.trunk.encoder.get_buffer("bn1.running_mean")[0] += 1e-6
        return step(features, labels, everyone)

    monkeypatch.setattr(one, "step", touching)
    with pytest.raises(TrunkChangedError, match="has changed"):
        one.run()


def on_ranks(world: World, place: str) -> tuple[Tensor, tuple[float, float]]:
    """Two epochs on this rank's share of each batch, then validation of 11 images."""
    one = protocol(Path(place), "ranks", world)
    config = Config(run=RunConfig(seed=5), optim=OptimConfig(global_batch_size=6))
    plan = make_plan(config, None, 16, world.rank, world.size, labelled=True)
    for number in range(2 * plan.steps_per_epoch):
        samples = plan.queries(number).samples.tolist()
        rows, everyone = plan.counted(number)
        pixels = torch.cat([one.train.load(sample, sample + 1) for sample in samples])
        one.step(one.trunk(pixels)[:rows], one.train.labels[samples][:rows], everyone)
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
    note.write_text(json.dumps({"batches": 2, "of": 4}))
    again = stored_features(one.trunk, one.train, place / "store", **options)
    assert (again[0, :8] == -1).all()
    assert torch.equal(again[0, 8:], found[0, 8:])


@pytest.mark.parametrize("note", ["", "{", "[]", '{"batches": 2}', '{"batches": 2, "of": 8}'])
def test_features_behind_a_note_that_is_damaged_or_counts_other_batches_are_computed_again(
    place: Path, note: str
) -> None:
    one = protocol(place)
    options: dict[str, Any] = {"device": CPU, "batch_size": 4}
    found = stored_features(one.trunk, one.train, place / "store", **options).clone()
    (file,), (kept,) = (place / "store").glob("*.npy"), (place / "store").glob("*.json")
    np.load(file, mmap_mode="r+")[:] = -1.0
    kept.write_text(note)
    assert torch.equal(stored_features(one.trunk, one.train, place / "store", **options), found)


def test_the_command_prints_a_table_and_refuses_in_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    root = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place)]
    small = ["--image_size", "32", "--epochs", "2", "--labels", "6-per-class", "--cached"]
    assert linear.main([*root, *small, "--out", str(place / "o")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chosen") == 1
    assert len([x for x in printed.splitlines() if x.count("%") == 3]) == 30
    assert json.loads((place / "o" / "results.jsonl").read_text())["images"] == 12
    lists = []
    for split in ("train", "test"):  # the same images and labels as lists
        rows = [f"{path},{path.parent.name}" for path in sorted((place / split).glob("*/*.*"))]
        (place / "o" / f"{split}.csv").write_text("\n".join(rows))
        lists += [f"--{split}", str(place / "o" / f"{split}.csv")]
    assert linear.main([*root[:2], *lists, *small, "--out", str(place / "o")]) == 0
    by_folder, by_list = (place / "o" / "results.jsonl").read_text().splitlines()
    assert by_list == by_folder
    capsys.readouterr()
    for arguments, part in (
        ([*root, "--labels", "9-per-class"], "has only 8"),
        ([*root, "--epochs", "0"], "--epochs is 0"),
        ([*root, "--lr", "-1"], "--lr is -1"),
        ([*root, "--lr", "1", "--cached"], "leave out --lr"),
        ([*root, "--crops", "2"], "--crops is for --cached"),
        ([*root, "--workers", "2", "--cached"], "leave it out with --cached"),
        (["--checkpoint", "nowhere", "--data.root", "x"], "nowhere does not exist"),
        ([*root[:2], "--data.root", str(place / "o")], "needs a folder train"),
    ):
        assert linear.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
