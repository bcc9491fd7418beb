"""Sources: every way to name the same images gives the same batches; the index keeps its word."""

from __future__ import annotations

import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.decode import decode
from fastmoco.data.loader import build_loader
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import Reader
from fastmoco.data.sources import folder as folder_module
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.folder import open_folder, scan_folder
from fastmoco.data.sources.image_list import open_list
from fastmoco.data.sources.index import Index, load_index, save_index
from fastmoco.data.sources.shards import open_shards
from fastmoco.data.sources.verify import verify
from tests.support.data.images import open_rgb

LIMIT = 10**8
RULE = PixelRule(max_pixels=LIMIT)
CPU = torch.device("cpu")


def files_of(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.jpg"), key=lambda path: (str(path.parent), path.name))


def write_shards(photos: Path, folder: Path, per_shard: int) -> Path:
    folder.mkdir(exist_ok=True)
    files = files_of(photos)
    for number, first in enumerate(range(0, len(files), per_shard)):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for path in files[first : first + per_shard]:
                tar.add(path, f"{path.stem}.jpg")
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"3"))
    return folder


def first_batches(tmp_path: Path, **data: object) -> list[torch.Tensor]:
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run"), seed=3),
        data=DataConfig(backend="array", workers=1, **data),  # type: ignore[arg-type]
        augment=AugmentConfig(image_size=24),
        optim=OptimConfig(global_batch_size=20),
    )
    with build_loader(config, device=CPU) as loader:
        return [view for batch in loader.batches(1, 5) for view in (batch.im_q, batch.im_k)]


def test_folder_list_csv_and_shards_give_the_same_batches(photos: Path, tmp_path: Path) -> None:
    files = files_of(photos)
    text = tmp_path / "images.txt"
    text.write_text("\n".join(str(path) for path in files) + "\n")
    table = photos / "images.csv"
    rows = [f"{number},{path.relative_to(photos)}" for number, path in enumerate(files)]
    table.write_text("\n".join(["label,path", *rows]))
    shards = write_shards(photos, tmp_path / "shards", 17)
    whole = write_shards(photos, tmp_path / "one", 60) / "0000.tar"
    expected = first_batches(tmp_path, root=str(photos))
    for source, root in [
        ("list", text),
        ("list", table),
        ("shards", shards),
        ("shards", shards),  # now from the index beside it
        ("shards", whole),
    ]:
        found = first_batches(tmp_path, source=source, root=str(root))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), root
    table.unlink()


def test_the_train_folder_is_looked_for_once(photos: Path, tmp_path: Path) -> None:
    """A class called train below the train folder is a class, not a data set."""
    files = files_of(photos)
    for number, folder in enumerate(["train", "train/train", "train/test"]):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{number}.jpg").write_bytes(files[number].read_bytes())
    config = resolve_folders(Config(data=DataConfig(root=str(tmp_path))))
    source = open_source(config)
    names = [Path(source.name(sample)).name for sample in range(len(source.sizes))]
    assert names == ["0.jpg", "2.jpg", "1.jpg"]


def test_shards_are_named_and_refused_clearly(photos: Path, tmp_path: Path) -> None:
    shards = write_shards(photos, tmp_path / "shards", 25)
    source = open_shards(str(shards), LIMIT)
    assert source.name(26) == f"{shards / '0001.tar'}:{files_of(photos)[26].name}"
    assert source.read(59) == files_of(photos)[59].read_bytes()
    assert (shards / "0001.tar.fastmoco-index").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ConfigError, match=r"a\.tar is compressed with gzip"):
        open_shards(str(broken), LIMIT)
    with pytest.raises(ConfigError, match=r"no \.tar file"):
        open_shards(str(photos), LIMIT)
    with pytest.raises(ConfigError, match="does not exist"):
        open_shards(str(tmp_path / "none"), LIMIT)


def test_hidden_members_of_a_shard_do_not_count(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    picture = next(path for path in sorted(photos.rglob("*.jpg")))
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name in ("a/one.jpg", "a/._one.jpg", ".two.jpg", "a/two.jpg"):
            tar.add(picture, name)
    source = open_shards(str(shards), 10**9)
    assert [source.name(i).rpartition(":")[2] for i in range(len(source.sizes))] == [
        "a/one.jpg",
        "a/two.jpg",
    ]


def test_a_changed_shard_is_indexed_again(photos: Path, tmp_path: Path) -> None:
    shards = write_shards(photos, tmp_path / "shards", 60)
    assert len(open_shards(str(shards), LIMIT).sizes) == 60
    with tarfile.open(shards / "0000.tar", "a") as tar:
        tar.add(files_of(photos)[0], "again.jpg")
    assert len(open_shards(str(shards), LIMIT).sizes) == 61


def test_an_added_removed_or_renamed_file_invalidates_the_cache(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    data = files_of(photos)[0].read_bytes()
    for place in ("0.jpg", "deep/1.jpg", "deep/er/2.jpg", "deep/er/note.txt", "deep/.hidden.jpg"):
        (root / place).write_bytes(data)
    assert len(open_folder(str(root), LIMIT).sizes) == 3
    scans: list[str] = []

    def counted(folder: str, max_pixels: int, **options: Any) -> Index:
        scans.append(folder)
        return scan_folder(folder, max_pixels, **options)

    monkeypatch.setattr(folder_module, "scan_folder", counted)
    assert len(open_folder(str(root), LIMIT).sizes) == 3
    assert not scans
    time.sleep(0.02)  # beyond the granularity of modification times
    (root / "deep/er/3.jpg").write_bytes(data)
    assert len(open_folder(str(root), LIMIT).sizes) == 4
    time.sleep(0.02)
    (root / "0.jpg").rename(root / "9.jpg")
    names = [open_folder(str(root), LIMIT).name(i) for i in range(4)]
    assert str(root / "9.jpg") in names
    assert len(scans) == 2


def test_odd_names_and_linked_loops(photos: Path, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "odd")
    os.mkdir(root)
    data = files_of(photos)[3].read_bytes()
    for name in (b"not utf-8 \xff\xfe.jpg", "ein Bild é.JPEG".encode(), b"a,b\"c'.Jpg"):
        with open(os.path.join(root, name), "wb") as file:
            file.write(data)
    os.symlink(root, os.path.join(root, b"loop"))
    source = open_folder(os.fsdecode(root), LIMIT)
    assert len(source.sizes) == 3
    assert all(source.read(sample) == data for sample in range(3))


def test_an_index_of_a_million_takes_less_than_100_bytes_per_sample(tmp_path: Path) -> None:
    """Names as in ImageNet; also: the file maps back to the same arrays, in milliseconds."""
    n = 1_000_000
    names = b"n01440764_10026.JPEG" * n
    arrays: dict[str, Any] = {
        "folder_of": np.repeat(np.arange(1000, dtype=np.uint32), n // 1000),
        "name_ends": np.arange(1, n + 1, dtype=np.uint64) * 20,
        "names": np.frombuffer(names, np.uint8),
        "sizes": np.full((n, 2), 500, np.int32),
    }
    folders = [[f"n{k:08d}", k] for k in range(1000)]
    index = save_index(Index(arrays, {"folders": folders}), tmp_path / "index")
    assert (tmp_path / "index").stat().st_size / n < 50
    assert sum(array.nbytes for array in index.arrays.values()) / n < 50
    source = folder_module.FolderSource("/data", index)
    assert source.name(999_999) == "/data/n00000999/n01440764_10026.JPEG"
    assert source.shard_sizes.sum() == n
    again = load_index(str(tmp_path / "index"))
    assert all(np.array_equal(again.arrays[k], arrays[k]) for k in arrays)
    with pytest.raises(ValueError, match="not an index"):
        load_index(__file__)


def test_window_order_reads_neighbours_and_resumes(photos: Path, tmp_path: Path) -> None:
    shards = write_shards(photos, tmp_path / "shards", 6)
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(
            source="shards", root=str(shards), backend="array", workers=1, shuffle_window=12
        ),
        augment=AugmentConfig(image_size=16),
        optim=OptimConfig(global_batch_size=10),
    )
    with build_loader(config, device=CPU) as loader:
        whole = [batch.im_q for batch in loader.batches(0, 9)]
        touched = [len(set((loader.plan.queries(step).samples // 6).tolist())) for step in range(6)]
    assert max(touched) <= 6  # of 10 shards; ten random samples touch 6.5 on average
    with build_loader(config, device=CPU) as loader:
        assert all(
            torch.equal(a.im_q, b) for a, b in zip(loader.batches(5, 9), whole[5:], strict=True)
        )


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def all_forms() -> dict[str, bytes]:
    """The same picture in every form that a collection of images may hold."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((48, 36))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (36, 48), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    return {
        "baseline.jpg": encoded(rgb, "JPEG", quality=90),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "gray.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "full.jpg": encoded(rgb, "JPEG", subsampling=0),
        "rgb.jpg": encoded(rgb, "JPEG", keep_rgb=True),
        "rotated.jpg": encoded(rgb, "JPEG", exif=exif),
        "true.png": encoded(rgb, "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG"),
        "transparent.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "gray.png": encoded(rgb.convert("L"), "PNG"),
        "gray_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "still.gif": encoded(rgb.quantize(64), "GIF"),
        "plain.bmp": encoded(rgb, "BMP"),
        "plain.ppm": encoded(rgb, "PPM"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "mpo.jpg": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
    }


def test_every_form_decodes_as_pil_does(tmp_path: Path) -> None:
    """What the readers hand to DALI decodes there to exactly PIL's RGB."""
    pytest.importorskip("nvidia.dali")
    from fastmoco.data.backends.dali import graph

    forms = all_forms()
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
    source = open_folder(str(tmp_path), LIMIT)
    assert not source.bad
    reader = Reader(source, 0, RULE)
    handed = [reader.load(sample) for sample in range(len(forms))]
    decoded = graph.decode_all([one.data for one in handed])
    for sample, (one, image) in enumerate(zip(handed, decoded, strict=True)):
        name = Path(source.name(sample)).name
        expected = np.asarray(open_rgb(forms[name]))
        assert (one.width, one.height) == expected.shape[1::-1], name
        assert tuple(source.sizes[sample]) == expected.shape[1::-1], name
        assert np.array_equal(image, expected), name
        assert np.array_equal(np.asarray(decode(one.data, RULE)), expected), name


def test_verify_finds_what_headers_do_not_show(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "some"
    root.mkdir()
    for number, path in enumerate(files_of(photos)[:8]):
        data = path.read_bytes()
        (root / path.name).write_bytes(data[: len(data) // 2] if number in (2, 5) else data)
    source = open_folder(str(root), LIMIT)
    assert not source.bad
    found = verify(source, RULE)
    assert sorted(found) == [2, 5]
    assert all("truncated" in reason for reason in found.values())
    assert verify(source, RULE) == found  # kept
    (kept,) = (tmp_path / "cache" / "verified").glob("*.json")
    for broken in ("", "[1]", "3", '{"0": 1}', '{"x": ["", []]}', '{"99": ["", []]}', "[" * 9999):
        kept.write_text(broken)
        assert verify(source, RULE) == found
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(root=str(root), verify=True, max_bad_share=0.5),
        optim=OptimConfig(global_batch_size=4),
    )
    with build_loader(config, device=CPU) as loader:
        assert sorted(loader.bad_samples.reasons) == [2, 5]
    strict = replace(config, data=replace(config.data, max_bad_share=0.1))
    with pytest.raises(ConfigError, match="2 of 8 samples are bad"):
        build_loader(strict, device=CPU)


def test_a_list_that_is_not_there_or_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        open_list(str(tmp_path / "none.txt"), LIMIT)
    (tmp_path / "empty.csv").write_text("path\n")
    with pytest.raises(ConfigError, match="no image"):
        open_list(str(tmp_path / "empty.csv"), LIMIT)
