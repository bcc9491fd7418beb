"""Class folders, the fixed view, shares of ranks, and features against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmoco.config import ConfigError, ModelConfig
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.evaluate import labelled_images
from fastmoco.evaluate.features import (
    FrozenTrunk,
    extract_features,
    rank_share,
    raw_pixel_features,
    stream_features,
    without_bad,
)
from fastmoco.evaluate.knn import ALONE
from fastmoco.evaluate.labelled_images import LabelledImages, eval_view, index_class_folders
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import build_encoder
from tests.support.ranks import Ranks


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes a (5 images) and b (6), every picture different, 12 x 9 pixels, plus strangers."""
    rng = np.random.default_rng(0)
    for name in ["b/5", "b/1", "a/2", "a/1", "b/deep/0", "b/2", "b/3", "b/4", "a/0", "a/3", "a/4"]:
        write(tmp_path / f"{name}.png", rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "list.txt").write_text("not a class")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_index_is_sorted_and_ignores_strangers(folder: Path) -> None:
    paths, labels, names = index_class_folders(folder)
    assert names == ["a", "b"]
    assert [str(p.relative_to(folder)) for p in paths] == [
        *(f"a/{i}.png" for i in range(5)),
        *(f"b/{i}.png" for i in range(1, 6)),
        "b/deep/0.png",
    ]
    assert labels == [0] * 5 + [1] * 6


def test_refuses_roots_without_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No folder"):
        index_class_folders(tmp_path / "missing")
    with pytest.raises(ConfigError, match="holds nothing"):
        index_class_folders(tmp_path)
    write(tmp_path / "flat.png", np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ConfigError, match="files but no class folders"):
        index_class_folders(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="None of the 1 class folders"):
        index_class_folders(tmp_path)


def test_view_of_fitting_image_is_its_exact_centre(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    write(tmp_path / "x.png", pixels)
    np.testing.assert_array_equal(
        eval_view((tmp_path / "x.png").read_bytes(), 8, 6), pixels[1:7, 4:10]
    )


def test_view_resizes_the_shorter_edge_and_keeps_the_ratio(tmp_path: Path) -> None:
    # Left half red, right half blue; 40 x 20 becomes 20 x 10, so the seam stays in the middle of
    # the crop, which would not be so if the longer edge or both edges became 10.
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    pixels[:, 20:, 2] = 255
    write(tmp_path / "x.png", pixels)
    view = eval_view((tmp_path / "x.png").read_bytes(), 10, 10)
    assert view.shape == (10, 10, 3)
    assert (view[:, :4] == [255, 0, 0]).all()
    assert (view[:, 6:] == [0, 0, 255]).all()
    write(tmp_path / "tall.png", pixels.transpose(1, 0, 2))
    tall = eval_view((tmp_path / "tall.png").read_bytes(), 10, 10)
    np.testing.assert_array_equal(tall.transpose(1, 0, 2), view)


def test_view_averages_when_it_shrinks(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    write(tmp_path / "x.png", stripes)
    inside = eval_view((tmp_path / "x.png").read_bytes(), 8, 8)[:, 1:-1]
    assert abs(inside.astype(float) - 127.5).max() < 4, "aliased"


def test_view_of_gray_and_transparent_files_is_rgb(tmp_path: Path) -> None:
    write(tmp_path / "gray.png", np.full((6, 6), 77, dtype=np.uint8))
    assert (eval_view((tmp_path / "gray.png").read_bytes(), 6, 6) == 77).all()
    rgba = np.full((6, 6, 4), 99, dtype=np.uint8)
    write(tmp_path / "rgba.png", rgba)
    assert eval_view((tmp_path / "rgba.png").read_bytes(), 6, 6).shape == (6, 6, 3)


def test_bad_images_are_counted_named_and_left_out(folder: Path) -> None:
    (folder / "b" / "3.png").write_bytes(b"not a picture")
    whole = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    write(folder / "a" / "3.png", np.zeros((40, 40, 3), dtype=np.uint8))
    images = LabelledImages(folder, resize=9, image_size=8, rule=PixelRule(max_pixels=1599))
    found = without_bad(raw_pixel_features(images), images, ALONE)
    assert found.kept.tolist() == [0, 2, 4, 5, 6, 8, 9, 10]
    assert len(found.features) == 8
    sentence = images.bad_sentence("images")
    assert sentence.startswith("3 of 11 images are bad and left out: ")
    assert all(name in sentence for name in ("a/1.png", "a/3.png", "b/3.png", "40 x 40"))


def kept_by_each(world: World, folder: str) -> tuple[list[int], list[int], list[int]]:
    images = LabelledImages(Path(folder), resize=9, image_size=8)
    rows = raw_pixel_features(images, rank=world.rank, world_size=world.size)
    found = without_bad(rows, images, world)
    return found.kept.tolist(), sorted(images.bad), [len(found.features)]


def test_ranks_leave_out_the_same_images(folder: Path, two_ranks: Ranks) -> None:
    (folder / "b" / "3.png").write_bytes(b"not a picture")  # in the share of the second rank
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert two_ranks.run(kept_by_each, str(folder)) == [(kept, [7], [5]), (kept, [7], [5])]


def test_hidden_files_do_not_count(folder: Path) -> None:
    before = index_class_folders(folder)
    for name in ("a/._0.png", "b/.thumbs/1.png", "a/.x.jpg"):
        write(folder / name, np.zeros((9, 12, 3), dtype=np.uint8))
    assert index_class_folders(folder) == before


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_bits_depend_on_nothing_but_weights_file_and_batch_size(folder: Path, stem: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(arch="resnet18", width=0.25, stem=stem)  # type: ignore[arg-type]
    trunk = FrozenTrunk(build_encoder(config), torch.float32)
    images = LabelledImages(folder, resize=32, image_size=32)
    # At this size a batch of one takes other kernels on the CPU, so filling up matters.
    together = extract_features(trunk, images, batch_size=4, device="cpu", normalized=False)
    assert together.std() > 0
    for share in (range(3, 4), range(2, 9), range(5, 11)):  # other neighbours, places and fillings
        alone = list(stream_features(trunk, images, share, batch_size=4, device="cpu"))
        assert torch.equal(torch.cat(alone), together[share.start : share.stop])


@pytest.mark.parametrize("n", [1, 7, 8, 100])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shares_in_rank_order_are_the_data_set(n: int, world_size: int) -> None:
    shares = [rank_share(n, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_share_of_unknown_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is outside of world_size 2"):
        rank_share(4, 2, 2)


def flat_trunk(batch: Tensor) -> Tensor:
    assert batch.dtype == torch.uint8
    return batch.flatten(1).double() - 100


@pytest.mark.parametrize("cache_bytes", [0, labelled_images.CACHE_BYTES])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gathered_features_are_normalized_views_in_order(
    folder: Path, cache_bytes: int, world_size: int
) -> None:
    paths, _, _ = index_class_folders(folder)
    expected = (
        np.stack([eval_view(p.read_bytes(), 9, 8) for p in paths]).reshape(11, -1).astype(float)
        - 100
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    images = LabelledImages(folder, resize=9, image_size=8, cache_bytes=cache_bytes)
    for _ in range(2):  # the second pass reads the cache
        gathered = torch.cat(
            [
                extract_features(
                    flat_trunk,
                    images,
                    batch_size=2,
                    device="cpu",
                    rank=rank,
                    world_size=world_size,
                )
                for rank in range(world_size)
            ]
        )
        assert gathered.dtype == torch.float32
        np.testing.assert_allclose(gathered.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("cache_bytes", "decodings"), [(0, 22), (labelled_images.CACHE_BYTES, 11)])
def test_images_that_fit_are_decoded_once(
    folder: Path, cache_bytes: int, decodings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def counted(data: bytes, resize: int, image_size: int, rule: PixelRule) -> np.ndarray:
        decoded.append(data)
        return eval_view(data, resize, image_size, rule)

    monkeypatch.setattr(labelled_images, "eval_view", counted)
    images = LabelledImages(folder, resize=9, image_size=8, cache_bytes=cache_bytes)
    for _ in range(2):
        extract_features(flat_trunk, images, batch_size=4, device="cpu")
    assert len(decoded) == decodings


def test_at_most_so_many_images_evenly_spaced(folder: Path) -> None:
    images = LabelledImages(folder, resize=9, image_size=8, max_images=4)
    everything = LabelledImages(folder, resize=9, image_size=8)
    assert images.paths == [everything.paths[i] for i in (0, 2, 5, 8)]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert len(LabelledImages(folder, resize=9, image_size=8, max_images=99)) == 11


@pytest.mark.parametrize("rank", [0, 11])
def test_more_ranks_than_images_is_a_sentence_on_every_rank(folder: Path, rank: int) -> None:
    images = LabelledImages(folder, resize=9, image_size=8)
    with pytest.raises(ConfigError, match="11 images cannot be shared by 12 ranks"):
        extract_features(flat_trunk, images, batch_size=4, device="cpu", rank=rank, world_size=12)


def test_raw_pixel_cosine_is_the_correlation_of_small_pictures(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        write(tmp_path / "a" / f"{i}.png", image)
    images = LabelledImages(tmp_path, resize=16, image_size=16)
    found = raw_pixel_features(images, size=8)
    small = pixels.astype(float).reshape(3, 8, 2, 8, 2, 3).mean(axis=(2, 4)).reshape(3, -1)
    np.testing.assert_allclose((found @ found.T).numpy(), np.corrcoef(small), atol=1e-5)
    gathered = torch.cat([raw_pixel_features(images, size=8, rank=r, world_size=2) for r in (0, 1)])
    torch.testing.assert_close(gathered, found)


def test_raw_pixels_of_one_gray_are_zero(tmp_path: Path) -> None:
    write(tmp_path / "a" / "flat.png", np.full((8, 8, 3), 60, dtype=np.uint8))
    images = LabelledImages(tmp_path, resize=8, image_size=8)
    assert raw_pixel_features(images).abs().max() == 0
