"""The recipes of the paper: their numbers, stated a second time; files of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config import ConfigError
from fastmoco.transfer import detect, segment
from fastmoco.transfer.command import parse, trunk_of
from fastmoco.transfer.detector import random_weights
from fastmoco.transfer.schedule import Schedule
from fastmoco.weights.architecture import Architecture

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "transfer"
NEEDED = ["--checkpoint", "random", "--data.root", "x", "--out", "x"]
# Architecture, task, iterations, steps, warm-up and the smallest short side of training.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "voc_c4_24k": ("c4", "boxes", 24000, (18000, 22000), 100, 480),
    "coco_c4_1x": ("c4", "masks", 90000, (60000, 80000), 1000, 640),
    "coco_c4_2x": ("c4", "masks", 180000, (120000, 160000), 1000, 640),
    "coco_fpn_1x": ("fpn", "masks", 90000, (60000, 80000), 1000, 640),
    "coco_fpn_2x": ("fpn", "masks", 180000, (120000, 160000), 1000, 640),
    "coco_keypoints_2x": ("fpn", "keypoints", 180000, (120000, 160000), 1000, 640),
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_have_the_published_numbers(path: Path) -> None:
    if path.stem == "voc_segmentation":
        given = parse(segment.parser(), ["--config", str(path), *NEEDED])
        schedule = Schedule.of(given)
        assert given.crop == 513
        assert (schedule.iterations, schedule.steps, schedule.lr) == (30000, (21000, 27000), 0.003)
        return
    given = parse(detect.parser(), ["--config", str(path), *NEEDED])
    detect.check(given)
    schedule = Schedule.of(given)
    sides = given.short_sides
    found = (given.arch, given.task, schedule.iterations, schedule.steps, schedule.warmup, sides[0])
    assert found == PUBLISHED[path.stem]
    assert list(sides) == list(range(sides[0], 801, 32))
    assert (given.test_side, given.max_side) == (800, 1333)
    assert (schedule.lr, schedule.batch_size, schedule.weight_decay) == (0.02, 16, 1e-4)


def test_without_a_recipe_the_schedule_is_that_of_voc() -> None:
    plain = detect.parser().parse_args(NEEDED)
    recipe = parse(detect.parser(), ["--config", str(RECIPES / "voc_c4_24k.yaml"), *NEEDED])
    assert {n: v if n != "config" else None for n, v in vars(recipe).items()} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(plain).items()
    }


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\nsteps: [5, 6]\n")
    given = parse(detect.parser(), ["--config", str(tmp_path / "mine.yaml"), *NEEDED, "--lr", "3"])
    assert (given.lr, given.steps) == (3.0, [5, 6])


@pytest.mark.parametrize("text", ["- 1", "lr: [", "nonsense: 3"])
def test_a_file_of_other_things_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    try:
        code = detect.main(["--config", str(tmp_path / "mine.yaml"), *NEEDED])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmoco: ")


def test_the_three_columns_of_the_paper_are_three_kinds_of_trunk(tmp_path: Path) -> None:
    small = random_weights(Architecture("resnet18", 0.125, "cifar"), seed=0)
    torch.save(small.trunk, tmp_path / "file.pth")
    read, column = trunk_of(str(tmp_path / "file.pth"), 0)
    assert column == "pre-trained"
    assert all(torch.equal(x, small.trunk[name]) for name, x in read.trunk.items())
    random, column = trunk_of(f"random:{tmp_path / 'file.pth'}", 1)
    assert column == "random"
    assert random.architecture == small.architecture
    assert not torch.equal(random.trunk["conv1.weight"], small.trunk["conv1.weight"])
    assert trunk_of("random:resnet34", 1)[0].architecture.arch == "resnet34"
    assert trunk_of(f"supervised:{tmp_path / 'file.pth'}", 0)[1] == "supervised"
    named = {f"module.encoder_q.{name}": x for name, x in small.trunk.items()}
    torch.save({"state_dict": named}, tmp_path / "moco.pth")
    with pytest.raises(ConfigError, match="which trains without labels"):
        trunk_of(f"supervised:{tmp_path / 'moco.pth'}", 0)
