"""`fastmoco embed`: order, names, bits, sources, formats, interruption and ranks."""

from __future__ import annotations

import csv
import dataclasses
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config, DataConfig, ModelConfig
from fastmoco.data.sources.choose import open_source
from fastmoco.evaluate import embed
from fastmoco.evaluate.features import FrozenTrunk, extract_features
from fastmoco.evaluate.knn import ALONE
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.linear.frozen import CheckedTrunk, stored_features
from fastmoco.evaluate.options import Evaluation, evaluation_parser
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import build_encoder
from tests.support.ranks import Ranks

OPTIONS = ("--image_size", "32", "--resize", "32", "--batch_size", "4", "--device", "cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="resnet18", width=0.25, stem="cifar"))
    trunk = {n: t for n, t in encoder.state_dict().items() if not n.startswith("fc.")}
    torch.save({"state_dict": trunk}, tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten pictures in two class folders, the fourth of them damaged, and a hidden one."""
    rng = np.random.default_rng(0)
    for name in [*(f"a/{i}" for i in range(6)), *(f"b/{i}" for i in range(4)), "b/._0"]:
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    damaged = tmp_path / "images" / "a" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return tmp_path / "images"


NAMES = [f"a/{i}.png" for i in (0, 1, 2, 4, 5)] + [f"b/{i}.png" for i in range(4)]


def run(checkpoint: Path, root: Path, out: Path, *more: str) -> int:
    return embed.main(
        [str(checkpoint), "--data.root", str(root), "--out", str(out), *OPTIONS, *more]
    )


def table(out: Path) -> tuple[list[str], np.ndarray]:
    with np.load(out) as kept:
        return kept["names"].tolist(), kept["features"]


def test_features_are_those_of_knn_and_linear_bit_for_bit(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, images, tmp_path / "x.npz") == 0
    assert "9 images of" in (printed := capsys.readouterr()).out
    assert "1 of 10 images are bad and left out" in printed.err
    assert "a/3.png" in printed.err
    names, features = table(tmp_path / "x.npz")
    assert names == NAMES
    assert features.dtype == np.float32
    assert not (tmp_path / "x.npz.parts").exists()

    labelled = LabelledImages(images, resize=32, image_size=32)
    given = evaluation_parser("x", "x").parse_args(["--checkpoint", str(checkpoint), *OPTIONS])
    assert given.precision == "fp32"  # as linear, where a machine would choose bf16 too
    trunk = Evaluation.of(given, ALONE).trunk
    normalized = extract_features(trunk, labelled, batch_size=4, device="cpu")
    good = labelled.good(range(10))
    mine = torch.nn.functional.normalize(torch.from_numpy(features), dim=1)
    assert torch.equal(mine, normalized[good])

    linear = stored_features(
        CheckedTrunk(checkpoint, torch.device("cpu")),
        LabelledImages(images, resize=32, image_size=32),
        tmp_path / "store",
        device=torch.device("cpu"),
        batch_size=4,
    )
    assert torch.equal(linear[0].isnan().all(dim=1), ~good)
    assert np.array_equal(linear[0, good].numpy(), features)


def test_lists_shards_and_tables_give_the_same_features(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"images/{name}\n" for name in reversed(NAMES)))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in NAMES:
            tar.add(images / name, name)
    assert run(checkpoint, images, tmp_path / "folder.npz") == 0
    assert run(checkpoint, listed, tmp_path / "list.npz", "--data.source", "list") == 0
    assert run(checkpoint, tmp_path / "0.tar", tmp_path / "t.npz", "--data.source", "shards") == 0
    _, features = table(tmp_path / "folder.npz")
    names, reverse = table(tmp_path / "list.npz")
    assert names == [f"images/{name}" for name in reversed(NAMES)]
    assert np.array_equal(reverse[::-1], features)
    names, sharded = table(tmp_path / "t.npz")
    assert names == [f"0.tar:{name}" for name in NAMES]
    assert np.array_equal(sharded, features)
    pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    data = {"image": [(images / name).read_bytes() for name in NAMES]}
    parquet.write_table(pa.table(data), tmp_path / "0.parquet")
    asked = ("--data.source", "parquet")
    assert run(checkpoint, tmp_path / "0.parquet", tmp_path / "p.npz", *asked) == 0
    names, columnar = table(tmp_path / "p.npz")
    assert names == [f"0.parquet:row {row}" for row in range(len(NAMES))]
    assert np.array_equal(columnar, features)


def test_csv_and_parquet_hold_the_same_numbers(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    assert run(checkpoint, images, tmp_path / "x.npz") == 0
    _, features = table(tmp_path / "x.npz")
    assert run(checkpoint, images, tmp_path / "x.csv") == 0
    with open(tmp_path / "x.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:2] == ["name", "feature_0"]
    assert [row[0] for row in rows] == NAMES
    assert np.array_equal(np.array([row[1:] for row in rows], np.float32), features)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(checkpoint, images, tmp_path / "x.parquet") == 0
    read = parquet.read_table(tmp_path / "x.parquet")
    assert read["name"].to_pylist() == NAMES
    assert np.array_equal(np.array(read["features"].to_pylist(), np.float32), features)


class KilledError(BaseException):
    """Ends the process where it stands."""


@pytest.mark.parametrize("inside", [False, True])
def test_a_killed_run_goes_on_where_it_was(
    inside: bool, checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it writes into the folder of the images."""
    monkeypatch.setattr(embed, "PART_BATCHES", 1)
    assert run(checkpoint, images, tmp_path / "whole.npz") == 0
    compute, computed = embed.Embedding._compute, list[range]()

    def killed(self: embed.Embedding, part: range, bar: object) -> None:
        if len(computed) == 2:
            raise KilledError
        compute(self, part, bar)
        computed.append(part)

    monkeypatch.setattr(embed.Embedding, "_compute", killed)
    out = (images if inside else tmp_path) / "x.npz"
    with pytest.raises(KilledError):
        run(checkpoint, images, out)
    assert not out.exists()
    computed.clear()
    assert run(checkpoint, images, out) == 0
    assert computed == [range(8, 10)]
    assert table(out)[0] == NAMES
    assert np.array_equal(table(out)[1], table(tmp_path / "whole.npz")[1])


def test_parts_of_something_else_are_refused(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.npz.parts").mkdir()
    (tmp_path / "x.npz.parts" / embed.PART_OF).write_text("another")
    assert run(checkpoint, images, tmp_path / "x.npz") == 2
    assert "holds parts of other weights" in capsys.readouterr().err
    assert run(checkpoint, images, tmp_path / "x.txt") == 2
    assert "must end in .npz, .parquet, .csv" in capsys.readouterr().err


def test_parts_of_images_normalized_in_another_way_are_no_parts_of_these(
    checkpoint: Path, images: Path
) -> None:
    given = evaluation_parser("x", "x").parse_args(["--checkpoint", str(checkpoint), *OPTIONS])
    one = Evaluation.of(given, ALONE)
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    trunk = FrozenTrunk(one.trunk.encoder, torch.float32, "cpu", half)
    other = dataclasses.replace(one, trunk=trunk)
    source = open_source(Config(data=DataConfig(source="folder", root=str(images))))
    assert embed.identity(one, source, 4) != embed.identity(other, source, 4)


def on_ranks(world: World, checkpoint: str, root: str, out: str) -> None:
    os.environ["FASTMOCO_CACHE"] = f"{out}.cache"
    embed.PART_BATCHES = 1
    options = evaluation_parser("x", "x", positional=True)
    options.add_argument("--out", type=Path)
    given = options.parse_args([checkpoint, "--data.root", root, "--out", out, *OPTIONS])
    embed._embed(given, world)


def test_ranks_share_the_work_and_the_order_stays(
    checkpoint: Path, images: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    assert run(checkpoint, images, tmp_path / "one.npz") == 0
    two_ranks.run(on_ranks, str(checkpoint), str(images), str(tmp_path / "two.npz"))
    assert table(tmp_path / "two.npz")[0] == NAMES
    assert np.array_equal(table(tmp_path / "two.npz")[1], table(tmp_path / "one.npz")[1])
