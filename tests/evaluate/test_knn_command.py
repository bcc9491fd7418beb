"""`fastmoco knn`: the numbers of the monitor from a file, with bad pictures and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import AugmentConfig, Config, KnnConfig, ModelConfig, dump
from fastmoco.evaluate.features import FrozenTrunk, extract_features
from fastmoco.evaluate.knn import ALONE, main
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.monitor import KnnMonitor
from fastmoco.method.moco import build_moco
from fastmoco.weights.read import read


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of noise around red and green, 12 bank and 8 test images of each, 8 x 8."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 8)):
        for label, name in enumerate(("red", "green")):
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                pixels[..., label] |= 55
                path = tmp_path / "data" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return tmp_path / "data"


CONFIG = Config(
    augment=AugmentConfig(image_size=8),
    model=ModelConfig(arch="resnet18", width=0.25, stem="cifar"),
    knn=KnnConfig(every=1, k=3, resize=8),
)


def test_command_and_monitor_agree_bit_for_bit_despite_a_damaged_picture(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "test" / "red" / "3.png").write_bytes(b"\x89PNG damaged")
    knn = replace(CONFIG.knn, train_root=str(data / "train"), test_root=str(data / "test"))
    config = replace(CONFIG, knn=knn)
    moco = build_moco(config, 0, torch.device("cpu"))
    with torch.no_grad():  # statistics unlike those at the start
        for buffer in moco.running_statistics():
            buffer.mul_(1.5).add_(0.01)
    monitor = KnnMonitor(config, ALONE)
    raw, top1 = monitor.raw_pixels(), monitor.trained(moco)
    told = capsys.readouterr().err
    assert told.count("1 of 16 kNN images are bad and left out") == 1
    assert "red/3.png" in told
    assert monitor.chance == 8 / 15

    names = {f"module.encoder_q.{n}": t for n, t in moco.encoder_q.state_dict().items()}
    file = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": names, "fastmoco": {"config": dump(config)}, "epoch": 0}, file)
    assert main(["--checkpoint", str(file), "--data.root", str(data), "--k", "1", "3"]) == 0
    printed = capsys.readouterr()
    row = next(line for line in printed.out.splitlines() if line.startswith("trained encoder"))
    assert row.split()[-2] == f"{100 * top1:.2f}"
    assert raw is not None
    pixels = next(line for line in printed.out.splitlines() if line.startswith("raw pixels"))
    assert pixels.split()[-2] == f"{100 * raw:.2f}"
    assert "24 bank and 15 test images, 2 classes" in printed.out
    assert "53.33 %" in printed.out
    assert "red/3.png" in printed.err

    images = LabelledImages(data / "train", resize=8, image_size=8)
    running, loaded = (
        extract_features(trunk, images, batch_size=256, device="cpu")
        for trunk in (
            FrozenTrunk(moco.encoder_q, torch.float32),
            FrozenTrunk.of(read(file), torch.float32),
        )
    )
    assert torch.equal(running, loaded)
    assert moco.encoder_q.training, "the monitor leaves training mode as it was"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "0"], "--k must be at least 1"),
        (["--resize", "4"], "--resize 4 is smaller than --image_size 8"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--test", "nowhere"], "No folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moco = build_moco(CONFIG, 0, torch.device("cpu"))
    torch.save({"state_dict": moco.encoder_q.state_dict()}, tmp_path / "e.pth")
    given = ["--checkpoint", str(tmp_path / "e.pth"), "--data.root", str(data)]
    assert main([*given, "--image_size", "8", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmoco: ")
    assert words in line


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none"), "--data.root", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
