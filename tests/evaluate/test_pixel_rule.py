"""Every command shows the network the pixels that its run saw, whatever kind of file they are in.

The pictures of one folder are marked: one with an alpha channel, one turned by EXIF, one in CMYK
and one too large. Those of the other are what the rule of the run makes of them, written plainly.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmoco.config import AugmentConfig, Config, DataConfig, KnnConfig, ModelConfig, dump
from fastmoco.evaluate import embed, finetune, knn, retrieval
from fastmoco.evaluate.features import BATCH_SIZE, filled_up
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.linear import __main__ as linear
from fastmoco.network.encoder import NormalizePixels, build_encoder

SIDE = 32
RUN = Config(
    data=DataConfig(alpha_over=(10, 200, 30), exif="apply", max_pixels=50 * 50),
    augment=AugmentConfig(image_size=SIDE),
    model=ModelConfig(arch="resnet18", width=1 / 8),
    knn=KnnConfig(resize=36),
)
LEARN = ["--epochs", "1", "--batch_size", "4"]
VERBS = {
    "knn": (knn.main, ["--k", "1"]),
    "retrieval": (retrieval.main, ["--out", "OUT/neighbours.png"]),
    "embed": (embed.main, ["--out", "OUT/features.npz"]),
    "linear": (linear.main, [*LEARN, "--workers", "1", "--out", "OUT"]),
    "linear cached": (linear.main, [*LEARN, "--cached", "--crops", "1", "--out", "OUT"]),
    "finetune": (finetune.main, [*LEARN, "--workers", "1", "--out", "OUT"]),
}


def checkpoint(path: Path, config: Config) -> Path:
    torch.manual_seed(0)
    names = build_encoder(config.model).state_dict()
    state = {f"module.encoder_q.{name}": tensor for name, tensor in names.items()}
    torch.save({"state_dict": state, "fastmoco": {"config": dump(config)}, "epoch": 1}, path)
    return path


def write_pair(marked: Path, plain: Path, kind: str, rng: np.random.Generator) -> None:
    """A picture under its own format, and what the rule of `RUN` makes of it as a plain PNG."""
    pixels = rng.integers(0, 256, (36, 44, 3), dtype=np.uint8)
    if kind == "alpha":
        opaque = rng.random((36, 44, 1)) < 0.5
        alpha = np.where(opaque, 255, 0).astype(np.uint8)
        Image.fromarray(np.concatenate([pixels, alpha], 2)).save(marked)
        pixels = np.where(opaque, pixels, np.array(RUN.data.alpha_over, np.uint8))
    elif kind == "exif":
        tags = Image.Exif()
        tags[0x0112] = 6  # the row that comes first is the right side of the picture
        Image.fromarray(pixels).save(marked, exif=tags)
        pixels = np.rot90(pixels, -1)
    elif kind == "cmyk":
        ink = np.concatenate([pixels, np.zeros((36, 44, 1), np.uint8)], 2)
        Image.frombytes("CMYK", (44, 36), ink.tobytes()).save(marked, format="TIFF")
        pixels = 255 - pixels  # without black, ink is what is missing of light
    elif kind == "large":
        Image.fromarray(rng.integers(0, 256, (51, 50, 3), dtype=np.uint8)).save(marked)
        plain.write_bytes(b"not a picture")
        return
    else:
        Image.fromarray(pixels).save(marked)
    Image.fromarray(pixels).save(plain, format="PNG")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders `marked` and `plain`, and a checkpoint of `RUN`."""
    monkeypatch.setattr(linear, "cache_folder", lambda: tmp_path / "cache")
    rng = np.random.default_rng(0)
    for part in ("train/a", "train/b", "test/a", "test/b"):
        for folder in ("marked", "plain"):
            (tmp_path / folder / part).mkdir(parents=True)
        for kind in ("alpha", "cmyk", "exif", "large", "usual"):
            suffix = ".tif" if kind == "cmyk" else ".png"
            name = f"{part}/{kind}{suffix}"
            write_pair(tmp_path / "marked" / name, tmp_path / "plain" / name, kind, rng)
    checkpoint(tmp_path / "run.pth.tar", RUN)
    return tmp_path


def shown(verb: str, file: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every batch, uint8 (n, S, S, 3), that a command shows its network on the pictures of root."""
    seen: list[Tensor] = []
    forward = NormalizePixels.forward

    def recorded(self: NormalizePixels, images: Tensor) -> Tensor:
        seen.append(images.clone())
        return forward(self, images)

    main, options = VERBS[verb]
    out = root.with_name(f"{root.name} {file.stem}")
    out.mkdir()
    options = [option.replace("OUT", str(out)) for option in options]
    where = [str(file)] if verb == "embed" else ["--checkpoint", str(file)]
    with monkeypatch.context() as patch:
        patch.setattr(NormalizePixels, "forward", recorded)
        assert main([*where, "--data.root", str(root), "--device", "cpu", *options]) == 0
    return seen


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_sees_what_the_run_saw(
    verb: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "run.pth.tar"
    marked = shown(verb, file, place / "marked", monkeypatch)
    said = capsys.readouterr().err
    assert re.search(r"large.png .*exceed data.max_pixels 2500", said), said
    plain = shown(verb, file, place / "plain", monkeypatch)
    assert len(marked) == len(plain) > 0
    assert all(torch.equal(one, other) for one, other in zip(marked, plain, strict=True))
    # The pictures that are only measured are those of every other command; by hand.
    part = "train" if verb == "embed" else "test"
    images = LabelledImages(place / "plain" / part, resize=36, image_size=SIDE)
    whole = filled_up(images.load(0, len(images)), BATCH_SIZE)
    assert any(torch.equal(whole, batch) for batch in marked)


def test_features_of_another_rule_are_not_taken_from_the_store(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and files: only the rule tells the stored features apart."""
    usual = Config(augment=RUN.augment, model=RUN.model, knn=RUN.knn)
    files = place / "run.pth.tar", checkpoint(place / "usual.pth.tar", usual)
    first, other = (shown("linear cached", f, place / "marked", monkeypatch) for f in files)
    assert len(first) == len(other)
    assert not torch.equal(first[0], other[0])
