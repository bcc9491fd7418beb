"""What is learned of a picture, by hand; runs that are killed, stopped and resumed; refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import StopRequest
from fastmoco.transfer import detect
from fastmoco.transfer.datasets.detection import Parts
from fastmoco.transfer.detect import learnable, mirrored, mirrored_names, on_device, prepare
from fastmoco.transfer.detector import Detector, build_detector, random_weights
from fastmoco.transfer.resize import SHORT_SIDE
from fastmoco.transfer.samples import Key, uniforms
from fastmoco.transfer.training import CHECKPOINT, Training
from fastmoco.weights.architecture import Architecture
from tests.support.data.objects import boxes
from tests.support.ranks import Ranks


def target() -> dict[str, Any]:
    """An object, a crowd, a difficult object and an empty box, in a picture 10 wide and 8 high."""
    masks = torch.zeros(4, 8, 10, dtype=torch.uint8)
    masks[0, 2:5, 1:4] = 1
    points = torch.tensor([[[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]]).repeat(4, 1, 1)
    return {
        "boxes": torch.tensor([[1.0, 2, 4, 5], [0, 0, 9, 9], [5, 5, 8, 8], [3, 3, 3, 6]]),
        "labels": torch.tensor([3, 1, 2, 1]),
        "masks": masks,
        "keypoints": points,
        "iscrowd": torch.tensor([0, 1, 0, 0]),
        "difficult": torch.tensor([False, False, True, False]),
        "area": torch.ones(4),
        "image_id": 7,
    }


def test_crowds_and_empty_boxes_are_not_learned_and_difficult_objects_as_asked() -> None:
    found = learnable(target(), "learn")
    assert found["labels"].tolist() == [3, 2]
    assert found["boxes"].tolist() == [[1, 2, 4, 5], [5, 5, 8, 8]]
    assert found["masks"].shape == (2, 8, 10)
    assert set(found) == {"boxes", "labels", "masks", "keypoints"}
    assert learnable(target(), "ignore")["labels"].tolist() == [3]
    plain = {name: x for name, x in target().items() if name in ("boxes", "labels")}
    assert learnable(plain, "ignore")["labels"].tolist() == [3, 1, 2]


def test_a_mirror_exchanges_left_and_right() -> None:
    image = torch.arange(80, dtype=torch.uint8).reshape(1, 8, 10).repeat(3, 1, 1)
    flipped, found = mirrored(image, target(), ["left_eye", "right_eye"])
    assert flipped[0, 0].tolist() == list(range(9, -1, -1))
    assert found["boxes"][0].tolist() == [6, 2, 9, 5]
    assert found["masks"][0].nonzero()[:, 1].unique().tolist() == [6, 7, 8]
    # The left eye, at pixel 1 of 10, is the right one now, at pixel 8; the other is not annotated.
    assert found["keypoints"][0].tolist() == [[0, 0, 0], [8, 2, 2]]
    again, twice = mirrored(flipped, found, ["left_eye", "right_eye"])
    assert torch.equal(again, image)
    assert all(torch.equal(twice[n], target()[n]) for n in ("boxes", "masks", "keypoints"))
    assert mirrored_names(["nose", "left_ear", "right_ear", "leftover"]) == [0, 2, 1, 3]


def test_flips_and_scales_follow_the_key() -> None:
    image = torch.arange(80, dtype=torch.uint8).reshape(1, 8, 10).repeat(3, 1, 1)
    for number in range(20):
        key = Key(0, 0, number)
        flip, scale = uniforms(key, 2)
        names = ["left_eye", "right_eye"]
        one = prepare((image, target()), key, sides=(8, 9), difficult="learn", names=names)
        assert torch.equal(one.image, image.flip(-1)) == (flip < 0.5)
        assert one.target[SHORT_SIDE] == (8 if scale < 0.5 else 9)


@pytest.mark.parametrize("width", [0.0, 1e-44, 1e-6, 1.2e-5, 2e-5, 1e-4, 1e-3])
def test_a_thin_box_ends_no_training(width: float) -> None:
    """Flipped, scaled or neither; 60 + 2e-5 is another number of 32 bits, 260 + 2e-5 is not."""
    weights = random_weights(Architecture("resnet18", 0.125, "imagenet"), seed=3)
    world = World(0, 0, 1, torch.device("cpu"), "none")
    model = Detector(
        build_detector(
            weights, world, arch="fpn", task="boxes", classes=2, proposals=4, max_size=700
        ),
        world,
    )
    left = 0.0 if width < 1e-7 else 60.0
    corners = torch.tensor([[left, 5.0, left + width, 30.0]], dtype=torch.float64).float()
    item = (
        torch.zeros(3, 40, 320, dtype=torch.uint8),
        {
            "boxes": corners,
            "labels": torch.tensor([2]),
        },
    )
    for number in range(6):
        key = Key(0, 0, number)
        one = prepare(item, key, sides=(32, 80), difficult="learn", names=[])
        losses = model(*on_device([one], world.device))
        assert all(bool(loss.isfinite()) for loss in losses.values())


SMALL = [
    *("--batch_size", "2", "--iterations", "5", "--steps", "3", "--warmup", "2"),
    *("--short_sides", "32", "48", "--test_side", "48", "--max_side", "64"),
    *("--proposals", "4", "--test_proposals", "4", "--workers", "0", "--device", "cpu"),
    *("--save_every", "2", "--test_every", "3", "--log_every", "1", "--precision", "fp32"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trunk; `--data.root` names nothing, six pictures are the data."""

    def pictures(_: str, split: str, **parts: bool) -> Any:
        return boxes(6, Parts(**parts))

    monkeypatch.setattr(detect, "detection_set", pictures)
    weights = random_weights(Architecture("resnet18", 0.125, "imagenet"), seed=3)
    torch.save(weights.trunk, tmp_path / "trunk.pth")
    return tmp_path


def command(place: Path, out: str, *more: str) -> list[str]:
    given = ["--checkpoint", str(place / "trunk.pth"), "--data.root", "anywhere"]
    return [*given, "--out", str(place / out), *SMALL, *more]


def state(place: Path, out: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(place / out / CHECKPOINT, weights_only=True)
    return content


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[n], second[n]) for n in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def test_a_run_that_was_killed_or_stopped_goes_on_bit_for_bit(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect.main(command(place, "whole")) == 0
    whole = state(place, "whole")
    assert whole["step"] == 5
    assert (place / "whole" / "report.html").read_text().count("data:image/png") == 6
    step = Training.step

    def dies(self: Training, samples: Any, number: int) -> Any:
        if number == 3:  # as SIGKILL: nothing is saved of the third step
            raise KeyboardInterrupt
        return step(self, samples, number)

    def signalled(self: Training, samples: Any, number: int) -> Any:
        if number == 3 and Training.step is signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, samples, number)

    for name, fault, code, done in (("killed", dies, 130, 2), ("stopped", signalled, 75, 4)):
        monkeypatch.setattr(Training, "step", fault)
        assert detect.main(command(place, name)) == code
        assert state(place, name)["step"] == done
        monkeypatch.setattr(Training, "step", step)
        assert detect.main(command(place, name)) == 0
        assert same(state(place, name), whole)
        lines = [json.loads(line) for line in (place / name / "metrics.jsonl").open()]
        assert [one["step"] for one in lines] == [1, 2, 3, 3, 4, 5, 5]
        assert lines[-1]["kind"] == "test"
        assert 0 <= lines[-1]["AP50"] <= 100
    capsys.readouterr()
    for more, tests in (((), 2), (("--test_proposals", "2"), 3), (("--test_proposals", "2"), 3)):
        assert detect.main(command(place, "whole", *more)) == 0
        lines = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").open()]
        assert sum(one["kind"] == "test" for one in lines) == tests  # as often as it was asked for
    assert detect.main(command(place, "whole", "--lr", "0.5")) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--arch", "c4", "--task", "keypoints"], "C4 has no head for keypoints"),
        (["--short_sides", "480", "8"], "--short_sides is 8"),
        (["--proposals", "0"], "--proposals is 0"),
        (["--save_every", "0"], "--save_every is 0"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--checkpoint", "random:resnet7"], "resnet7 does not exist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    assert detect.main(command(place, "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_a_picture_that_cannot_be_read_ends_the_run_with_its_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> Any:
        raise ConfigError("The picture x.jpg cannot be decoded.")

    monkeypatch.setattr("fastmoco.transfer.datasets.detection.Detections.__getitem__", unreadable)
    assert detect.main(command(place, "out")) == 2
    assert capsys.readouterr().err == "fastmoco: The picture x.jpg cannot be decoded.\n"


def on_ranks(world: World, out: str, batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train and test on this rank; the final weights, and the scores."""
    given = detect.parser().parse_args(
        ["--checkpoint", "random", "--data.root", ".", "--out", out, *SMALL]
    )
    given.batch_size = batch
    weights = random_weights(Architecture("resnet18", 0.125, "imagenet"), seed=3)

    def number_found(found: list[Any], data: Any) -> dict[str, float]:
        assert len(found) == len(data)
        return {"found": float(sum(len(one["boxes"]) for one in found))}

    run = detect.Detection(weights, boxes(7), boxes(3), given, world, number_found)
    scores = run.run(StopRequest(), run.evaluate)
    return run.kept.state_dict(), scores


def test_two_ranks_end_with_one_network_and_one_score(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(on_ranks, str(tmp_path), 2)
    assert same(first, second)
    assert first[1]["found"] > 0
