"""Average precision by hand and against a float64 loop; the picture of neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from fastmoco.config import ModelConfig
from fastmoco.evaluate import retrieval
from fastmoco.evaluate.retrieval import _fitting, average_precisions, main
from fastmoco.network.encoder import build_encoder


def at(*degrees: float) -> torch.Tensor:
    angles = [math.radians(d) for d in degrees]
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_average_precision_by_hand() -> None:
    # Ranked by angle to the query at 0: labels 1 0 1 0 1 -> (1/1 + 2/3 + 3/5) / 3 for label 1,
    # (1/2 + 2/4) / 2 for label 0; label 2 has nothing to find.
    bank, labels = at(30, 10, 50, 20, 40), torch.tensor([1, 1, 1, 0, 0])
    found = average_precisions(bank, labels, at(0, 0, 0), torch.tensor([1, 0, 2]))
    assert found[0] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    assert found[1] == pytest.approx(0.5, abs=1e-15)
    assert found[2].isnan()


@pytest.mark.parametrize("similarities", [1 << 26, 3000])
def test_agrees_with_float64(similarities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = (
        torch.nn.functional.normalize(torch.randn(n, 6, generator=generator)) for n in (150, 31)
    )
    labels, wanted = torch.arange(150) % 4, torch.arange(31) % 4
    monkeypatch.setattr(retrieval, "SIMILARITIES", similarities)  # 3000: two queries at a time
    expected = []
    for query, label in zip(queries.double(), wanted.tolist(), strict=True):
        hits, precisions = 0, []
        for rank, i in enumerate(np.argsort(-(bank.double() @ query).numpy()), 1):
            if labels[i] == label:
                hits += 1
                precisions.append(hits / rank)
        expected.append(sum(precisions) / len(precisions))
    found = average_precisions(bank, labels, queries, wanted)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_titles_fit_below_their_picture() -> None:
    font = ImageFont.load_default(11)
    assert _fitting("frog", font) == "frog"
    cut = _fitting("a very long name of a class that nobody wants to read", font)
    assert cut.startswith("a very")
    assert cut.endswith("...")
    assert font.getlength(cut) <= 96


def test_command_prints_map_and_draws_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            for i in range(count):
                pixels = np.tile(np.array(colour, np.uint8), (8, 8, 1))
                pixels ^= rng.integers(0, 8, pixels.shape, dtype=np.uint8)
                path = tmp_path / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (tmp_path / "train" / "blue" / "0.png").write_bytes(b"damaged")
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=0.25, stem="cifar"))
    trunk = {n: t for n, t in encoder.state_dict().items() if not n.startswith("fc.")}
    torch.save(trunk, tmp_path / "e.pth")
    out = tmp_path / "near.png"
    given = ["--checkpoint", str(tmp_path / "e.pth"), "--data.root", str(tmp_path)]
    view = ["--image_size", "8", "--out", str(out), "--queries", "2", "--neighbours", "3"]
    assert main([*given, *view]) == 0
    printed = capsys.readouterr()
    assert "mAP 100.00 % of 4 queries, 11 bank" in printed.out
    assert "blue/0.png" in printed.err
    with Image.open(out) as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 240) & (pixels[..., 2] < 10)
    blue = (pixels[..., 2] > 240) & (pixels[..., 0] < 10)
    # Four pictures of 96 x 96 in each row: the query and its three nearest.
    assert red.sum() == blue.sum() == 4 * 96 * 96
    assert not red[: len(red) // 2].any()
    assert not ((pixels == (0xCC, 0x33, 0x11)).all(axis=2)).any(), "no neighbour is of the other"
