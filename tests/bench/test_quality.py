"""Our run and the published one learn the same from the same views, until roundings part them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from bench.measure.rows import Row
from bench.quality import main


def colour_classes(root: Path) -> list[str]:
    """Options of a run on two classes of colour, with pictures kept apart for kNN."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for name, channel in (("red", 0), ("blue", 2)):
            (folder := root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3), np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return [
        *("--data.root", str(root), "--data.backend=pil", "--data.workers=1", "--run.device=cpu"),
        *("--run.precision=fp32", "--augment.image_size=16", "--model.arch=resnet18"),
        *(
            "--model.stem=cifar",
            "--model.width=0.125",
            "--moco.queue_size=32",
            "--optim.global_batch_size=16",
        ),
        *("--optim.epochs=4", "--knn.every=1", "--knn.resize=16", "--knn.k=3"),
    ]


@pytest.mark.parametrize("disturbed", [False, True])
def test_both_learn_the_same(tmp_path: Path, disturbed: bool) -> None:
    """And an error of the step, here in the momentum update, shows."""
    options = [*colour_classes(tmp_path / "set"), f"--run.dir={tmp_path / 'run'}", "--seeds=1"]
    shown: list[Row] = []
    with mock.patch("bench.measure.program.show", shown.extend), ExitStack() as stack:
        if disturbed:
            moved = "bench.steps.published.OfficialMoCo._move_key_encoder"
            stack.enter_context(mock.patch(moved))
        assert main(options) == 0
    published, ours = shown
    assert [row["contestant"] for row in shown] == ["published", "ours"]
    assert len(ours["loss"]) == 4
    assert len(ours["knn"]) == 5  # the first before any step
    assert ours["knn"][0] == published["knn"][0] > 0.5
    # Later epochs amplify the roundings: at this learning rate every few steps tenfold.
    near = np.allclose(ours["loss"][:2], published["loss"][:2], atol=3e-4)
    assert near is not disturbed
