"""The table of what an encoder has learned: three rows per encoder that agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import ModelConfig
from fastmoco.data.pixels.rule import RGB8
from fastmoco.evaluate.features import FrozenTrunk
from fastmoco.evaluate.knn import ALONE, TEMPERATURE
from fastmoco.evaluate.linear import __main__ as linear
from fastmoco.evaluate.monitor import KnnTask
from fastmoco.experiments import linear_table
from fastmoco.network.encoder import build_encoder
from fastmoco.weights.read import read

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes that colour hardly tells apart, 12 training and 20 test images of each."""
    for module in (linear, linear_table):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    rng = np.random.default_rng(0)
    for name, count in (("train/a", 12), ("train/b", 12), ("test/a", 20), ("test/b", 20)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3)) * (1 - 0.1 * name.endswith("a"))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    torch.manual_seed(3)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=1 / 8))
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    return tmp_path


def test_every_encoder_has_three_rows_and_both_linear_ones_agree(place: Path) -> None:
    out, file = place / "rows.jsonl", place / "encoder.pth"
    words = ["--checkpoint", str(file), "--data.root", str(place), "--out", str(out), "--k", "5"]
    words += ["--image_size", "32", "--resize", "32", "--epochs", "2", "--batch_size", "8"]
    assert linear_table.main([*words, "--workers", "1", "--seed", "7"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["encoder"], row["kind"]): row for row in rows}
    assert len(found) == len(rows) == 9
    for encoder in linear_table.ENCODERS:
        cached, full = found[encoder, "linear_cached"], found[encoder, "linear"]
        assert full["lr"] == cached["lr_without_decay"]
        assert full["val_top1"] == cached["val_top1_without_decay"]
        assert (full["images"], full["test_images"], full["seed"]) == (24, 40, 7)
    task = KnnTask(
        place / "train", place / "test", ALONE, resize=32, image_size=32, rule=RGB8, max_bank=0
    )
    trunk = FrozenTrunk.of(read(file), torch.float32)
    trained = task.of_trunk(trunk, ks=[5], temperature=TEMPERATURE, batch_size=256)
    assert [found["trained", "knn"]["val_top1"]] == trained
    pixels = task.of_pixels(ks=[5], temperature=TEMPERATURE)
    assert [found["raw pixels", "knn"]["val_top1"]] == pixels
    assert {"torch", "processor", "date", "command"} <= set(rows[0])


def test_the_seed_makes_the_untrained_encoder(place: Path) -> None:
    marks = [
        linear_table.trunk_of("untrained", place / "encoder.pth", seed, CPU).fingerprint()
        for seed in (0, 0, 1)
    ]
    assert marks[0] == marks[1] != marks[2]
    trained = linear_table.trunk_of("trained", place / "encoder.pth", 0, CPU).fingerprint()
    assert trained not in marks


def test_rows_need_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(place / "encoder.pth"), "--data.root", str(place)]
    assert linear_table.main([*words, "--out", str(place / "rows")]) == 2
    assert "must name the file of rows" in capsys.readouterr().err
