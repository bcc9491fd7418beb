"""Pictures of features for the report: the right checkpoints, and the plane of largest variance."""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import ConfigError, ModelConfig
from fastmoco.config.names import in_figure
from fastmoco.evaluate import report_pictures
from fastmoco.evaluate.report_pictures import checkpoints, draw_map, principal_plane
from fastmoco.network.encoder import build_encoder
from fastmoco.report import main


def test_first_and_last_checkpoint_by_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoints(tmp_path)
    names = [f"checkpoint_{epoch:04d}_step{step:08d}.pth.tar" for epoch, step in ((2, 9), (1, 100))]
    for name in (*names, "latest.pth.tar", "checkpoint_0001_step00000001.pth.tar.partial"):
        (tmp_path / name).touch()
    assert [p.name for p in checkpoints(tmp_path)] == names
    (tmp_path / names[0]).unlink()
    assert [p.name for p in checkpoints(tmp_path)] == names[1:]


def test_the_plane_holds_the_largest_variance_with_fixed_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    coordinates -= coordinates.mean(dim=0)
    coordinates = torch.linalg.qr(coordinates).Q * torch.tensor([3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(7, 2, generator=generator, dtype=torch.float64)).Q
    signs = torch.stack([column[column.abs().argmax()].sign() for column in basis.T])
    points, shares = principal_plane(coordinates @ basis.T + 5)
    torch.testing.assert_close(points, coordinates * signs, rtol=1e-9, atol=1e-9)
    assert shares == pytest.approx([0.9, 0.1])
    turned, _ = principal_plane(-(coordinates @ basis.T))
    torch.testing.assert_close(turned, -points, rtol=1e-9, atol=1e-9)


def test_one_feature_or_one_image_still_has_a_map() -> None:
    points, shares = principal_plane(torch.ones(3, 1))
    assert points.tolist() == [[0, 0]] * 3
    assert sum(shares) == 0
    points, _ = principal_plane(torch.ones(1, 4))
    assert points.shape == (1, 2)


def test_more_classes_than_marks_are_drawn_together() -> None:
    labels = [i % 30 for i in range(90)]
    png = draw_map(torch.randn(90, 2), labels, [f"class {i}" for i in range(30)])
    assert Image.open(io.BytesIO(png)).size == (720, 540)


def test_names_are_drawn_sign_by_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["$x_5$ of $y^2$", "cost $5_$6_", r"\$a$", "one $"]
    points, labels = torch.arange(8.0).reshape(4, 2), [0, 1, 2, 3]
    drawn = draw_map(points, labels, names)
    with matplotlib.rc_context({"text.parse_math": False}), monkeypatch.context() as patch:
        patch.setattr(report_pictures, "in_figure", lambda name: name)
        assert draw_map(points, labels, names) == drawn
    escaped = {
        **{"_a_b": " _a_b", "a\nb\0": r"a\nb\x00", "\udcff": r"\udcff", "\u3000a": " a"},
        **{"\u00e9 \u72ac_": "\u00e9 \u72ac_", "": ""},
    }
    assert {name: in_figure(name) for name in escaped} == escaped


def test_the_page_shows_the_encoder_untrained_and_at_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    odd = os.fsdecode(b"$\\frac$ \xff_")  # no formula, and no text
    for name in ("train/a", f"train/{odd}", "test/a", f"test/{odd}"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    run = tmp_path / f"run {odd}"
    run.mkdir()
    encoder = build_encoder(ModelConfig(arch="resnet18", width=1 / 8))
    torch.save(encoder.state_dict(), run / "checkpoint_0001_step00000004.pth.tar")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "epoch": 1.0, "loss": 3.0}\n')
    assert main([str(run), "--data.root", str(tmp_path / "data")]) == 0
    text = (run / "report.html").read_text()
    for when in ("untrained", "checkpoint_0001_step00000004.pth.tar"):
        assert f"Nearest images, {when}" in text
        assert f"Map of features, {when}" in text
    assert text.count('src="data:image/png;base64,') == 4
    capsys.readouterr()
    assert main([str(run), str(run), "--data.root", "x"]) == 2
    assert "name one run directory" in capsys.readouterr().err
    assert main([str(run), "--data.root", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
