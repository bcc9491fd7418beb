"""Fine-tuning: rates by hand, steps by torch alone, exact resume, two ranks, torchvision format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from fastmoco.config import ModelConfig
from fastmoco.evaluate import finetune
from fastmoco.evaluate.finetune import Classifier, Finetuning, cosine, stage_rates
from fastmoco.evaluate.labelled_part import both_folders
from fastmoco.evaluate.options import View
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import build_encoder
from fastmoco.weights.read import read
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU, "none")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """14 training and 8 test images of two classes of other colours; a random encoder."""
    rng = np.random.default_rng(0)
    for name, count in (("train/a", 7), ("train/b", 7), ("test/a", 4), ("test/b", 4)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
            pixels[..., 2 * name.endswith("a")] //= 8
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=1 / 8))
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    return tmp_path


def options(place: Path, out: str, *more: str) -> list[str]:
    files = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place)]
    small = ["--image_size", "32", "--batch_size", "6", "--epochs", "3", "--workers", "1"]
    small += ["--precision", "fp32"]
    return [*files, "--out", str(place / out), *small, "--device", "cpu", *more]


def tuning(place: Path, out: str = "out", world: World = ALONE, *more: str) -> Finetuning:
    given = finetune.parser().parse_args(options(place, out, *more))
    weights = read(given.checkpoint)
    return Finetuning(weights, *both_folders(given, View.of(given, weights)), given, world)


def test_every_stage_has_its_rate_and_every_parameter_is_in_one_group(place: Path) -> None:
    network = Classifier(read(place / "encoder.pth"), 2, 0, CPU).network
    groups = stage_rates(network, 0.1, 5.0, 0.5)
    assert [g["peak"] for g in groups] == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 0.1, 5.0])
    rate_of = {id(p): g["peak"] for g in groups for p in g["params"]}
    assert len(rate_of) == sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    named = dict(network.named_parameters())
    for name, rate in (
        ("conv1.weight", 0.00625),
        ("bn1.bias", 0.00625),
        ("layer1.0.conv1.weight", 0.0125),
        ("layer4.1.bn2.weight", 0.1),
        ("fc.bias", 5.0),
    ):
        assert rate_of[id(named[name])] == pytest.approx(rate)


def test_the_rate_rises_in_a_line_and_falls_in_a_half_cosine() -> None:
    found = [cosine(step, 2, 6) for step in range(6)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])
    assert cosine(0, 0, 4) == 1.0


def test_two_steps_are_those_of_torch_alone_in_float64(place: Path) -> None:
    """With an incomplete batch: the last two images take part in batch norm only."""
    one = tuning(place, "out", ALONE, "--layer_decay", "0.5", "--weight_decay", "0.01")
    images, labels = one.train.load(4, 10), one.train.labels[4:8]
    alone = Classifier(read(place / "encoder.pth"), 2, 0, CPU).double()
    alone.load_state_dict(one.model.state_dict())
    optimizer = torch.optim.SGD(alone.parameters(), 1.0, momentum=0.9, weight_decay=0.01)
    shares = {"layer4": 1.0, "layer3": 0.5, "layer2": 0.25, "layer1": 0.125}
    groups = [
        {
            "params": [p],
            "rate": 0.2 if "fc." in n else 0.01 * shares.get(n.split(".")[1], 1 / 16),
        }
        for n, p in alone.named_parameters()
    ]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=0.9, weight_decay=0.01)
    normal = (images.permute(0, 3, 1, 2).double() / 255 - MEAN) / STD
    alone.train()
    for step in (0, 1):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + np.cos(np.pi * step / 9))
        optimizer.zero_grad()
        nn.functional.cross_entropy(alone.network(normal)[:4], labels).backward()
        optimizer.step()
        one.learn(images, labels, 4, step)
    for (name, mine), other in zip(one.model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=2e-5, msg=name)


MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)


def test_it_learns_resumes_exactly_and_refuses_another_recipe(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--lr", "0.01", "--head_lr", "0.05"]
    assert finetune.main(options(place, "whole", *more)) == 0
    lines = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").open()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    validate, calls = Finetuning.validate, iter([False, True])

    def interrupted(self: Finetuning) -> tuple[float, float]:
        if next(calls, False):
            raise KeyboardInterrupt
        return validate(self)

    monkeypatch.setattr(Finetuning, "validate", interrupted)
    assert finetune.main(options(place, "halves", *more)) == 130
    assert finetune.main(options(place, "halves", *more)) == 0
    whole, halves = (torch.load(place / n / "classifier.pth") for n in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    capsys.readouterr()
    assert finetune.main(options(place, "halves", *more, "--layer_decay", "0.5")) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_the_accuracy_told_is_that_of_the_network_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([(0.5, 1.0), (0.875, 1.0), (0.75, 1.0)])
    monkeypatch.setattr(Finetuning, "validate", lambda self: next(found))
    for _ in ("trained", "complete already"):
        assert finetune.main(options(place, "out")) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert "top-1 75.00 % after the last epoch (best 87.50 %)" in said
    for line in (place / "out" / "results.jsonl").open():
        result = json.loads(line)
        assert (result["last_top1"], result["val_top1"]) == (0.75, 0.875)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--lr", "0"], "--lr is 0.0"),
        (["--layer_decay", "-1"], "--layer_decay is -1.0"),
        (["--weight_decay", "-1"], "--weight_decay is -1.0"),
        (["--warmup_epochs", "3"], "less than --epochs 3"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--labels", "8-per-class"], "has only 7"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    assert finetune.main(options(place, "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize("name", [b"b\nreak.png", b"\xff.png"])
def test_a_name_that_no_list_can_hold_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    folder = os.fsencode(place / "train" / "a")
    os.link(os.path.join(folder, b"0.png"), os.path.join(folder, name))
    assert finetune.main(options(place, "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rename it" in line


def test_the_result_is_a_torchvision_network(tmp_path: Path, place: Path) -> None:
    torch.manual_seed(1)
    torch.save(build_encoder(ModelConfig(arch="resnet18")).state_dict(), place / "encoder.pth")
    assert finetune.main(options(place, "out", "--epochs", "1")) == 0
    network = torchvision.models.resnet18(num_classes=2)
    network.load_state_dict(torch.load(place / "out" / "classifier.pth"), strict=True)
    again = tuning(place, "out", ALONE, "--epochs", "1")
    again._resume()
    images = again.test.load(0, 4)
    normal = ((images.permute(0, 3, 1, 2).double() / 255 - MEAN) / STD).float()
    torch.testing.assert_close(again.logits(images), network.eval()(normal), rtol=1e-4, atol=1e-4)


def on_ranks(world: World, place: str) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """A step on the same four images on every rank, then validation of 8."""
    one = tuning(Path(place), "ranks", world)
    images, labels = one.train.load(4, 8), one.train.labels[4:8]
    one.learn(images, labels, 4 * world.size, 0)
    weights = {name: p.detach() for name, p in one.model.named_parameters()}
    return weights, one.validate()


def statistics_of(world: World, place: str, number: int | None = None) -> Tensor:
    """Running means after two steps, too small to move a weight, on images of one's own."""
    rate = ["--lr", "1e-9", "--head_lr", "1e-9"]
    one = tuning(Path(place), f"statistics{number}", world, *rate)
    first = 4 * (world.rank if number is None else number)
    for step in range(2):
        images, labels = one.train.load(first, first + 4), one.train.labels[first : first + 4]
        one.learn(images, labels, 4 * world.size, step)
    mean = one.model.network.bn1.running_mean
    assert isinstance(mean, Tensor)
    return mean.clone()


def test_batch_norm_counts_on_each_rank_for_itself(place: Path, two_ranks: Ranks) -> None:
    alone = [statistics_of(ALONE, str(place), number) for number in range(2)]
    found = two_ranks.run(statistics_of, str(place))
    for rank, mean in enumerate(found):
        torch.testing.assert_close(mean, alone[rank], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)


def test_two_ranks_that_see_the_same_do_what_one_does(place: Path, two_ranks: Ranks) -> None:
    weights, counted = on_ranks(ALONE, str(place))
    for rank_weights, rank_counted in two_ranks.run(on_ranks, str(place)):
        for name, weight in weights.items():
            torch.testing.assert_close(rank_weights[name], weight, rtol=1e-4, atol=1e-6)
        assert rank_counted == pytest.approx(counted)
