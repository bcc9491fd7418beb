"""Parquet and Arrow files give the images that went into them, and say what is wrong with others.

The oracle is the list of encoded images that the test wrote.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import Config, ConfigError, DataConfig, KnnConfig, RunConfig
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.columnar import rows as module
from fastmoco.data.sources.columnar.rows import RowSource, kind_of, open_rows
from fastmoco.data.sources.fingerprint import changes, fingerprint
from fastmoco.evaluate.labelled_images import LabelledImages

pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")

N = 50
MANY = 1 << 30


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A picture of (20 + number) x 16 pixels that is unlike all others."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 20 + number, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [encoded(n, ("PNG", "JPEG")[n % 2]) for n in range(N)]


def hub_table(images: Sequence[bytes | None], labels: Sequence[int] | None = None) -> Any:
    """As `datasets` writes it: struct{bytes, path}, and the features in the metadata."""
    rows = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"thumbnail": pa.array([b"x"] * len(images)), "image": pa.array(rows, kind)}
    features: dict[str, Any] = {"image": {"_type": "Image"}, "thumbnail": {"_type": "Value"}}
    if labels is not None:
        columns["fine"] = pa.array(labels)
        features["fine"] = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(said)


def write_parquet(table: Any, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=7)


def write_stream(table: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=7)


def write_file(table: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=7)


WRITERS: list[tuple[str, Callable[[Any, Path], None]]] = [
    ("parquet", write_parquet),
    ("arrow", write_stream),
    ("arrow", write_file),
]
EVERY = pytest.mark.parametrize(("kind", "write"), WRITERS, ids=["parquet", "stream", "file"])


@EVERY
@pytest.mark.parametrize("hub", [True, False])
def test_every_row_is_its_image_in_any_order(
    tmp_path: Path, kind: str, write: Callable[[Any, Path], None], hub: bool
) -> None:
    part = 23
    for number, images in enumerate((IMAGES[:part], IMAGES[part:])):
        plain = pa.table({"id": pa.array(range(len(images))), "jpg": pa.array(images)})
        write(hub_table(images) if hub else plain, tmp_path / f"train-{number}.{kind}")
    source = pickle.loads(pickle.dumps(open_rows(kind, str(tmp_path), MANY)))
    order = np.random.default_rng(3).permutation(N).tolist()
    assert [source.read(n) for n in order] == [IMAGES[n] for n in order]
    assert source.sizes.tolist() == [[20 + n, 16] for n in range(N)]
    assert source.shard_sizes.tolist() == [7, 7, 7, 2, 7, 7, 7, 6]
    assert source.name(part + 4) == f"{tmp_path}/train-1.{kind}:row 4"
    assert list(source.relative_names())[part - 1 : part + 1] == [
        b"train-0.%s 22" % kind.encode(),
        b"train-1.%s 0" % kind.encode(),
    ]


@EVERY
def test_bad_rows_keep_their_numbers_and_are_named(
    tmp_path: Path, kind: str, write: Callable[[Any, Path], None]
) -> None:
    images = [IMAGES[0], None, b"no image", b"", IMAGES[4]]
    path = tmp_path / f"a.{kind}"
    write(hub_table(images), path)
    source = open_rows(kind, str(path), MANY)
    assert sorted(source.bad) == [1, 2, 3]
    assert source.bad[1] == "OSError: the row holds no image"
    assert source.sizes.tolist() == [[20, 16], [0, 0], [0, 0], [0, 0], [24, 16]]
    assert source.read(4) == IMAGES[4]
    with pytest.raises(Exception, match="OSError: the row holds no image"):
        read_sample(source, 1)
    assert sorted(open_rows(kind, str(path), 20 * 16).bad) == [1, 2, 3, 4]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"jpg": IMAGES}), path, row_group_size=7, compression="zstd")
    chunk = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)
    source = open_rows("parquet", str(path), MANY)
    assert sorted(source.bad) == list(range(14, 21))
    with pytest.raises(OSError, match=r"\w+"):
        source.read(15)
    assert source.read(21) == IMAGES[21]


@EVERY
def test_files_that_cannot_be_used_are_refused_in_a_sentence(
    tmp_path: Path, kind: str, write: Callable[[Any, Path], None]
) -> None:
    path = tmp_path / f"a.{kind}"

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            open_rows(kind, str(tmp_path), MANY)
        return str(error.value)

    assert f"holds no .{kind} file" in refused()
    write(pa.table({"jpg": IMAGES}), path)
    whole = path.read_bytes()
    for wrong in (b"", b"text that is none", whole[: len(whole) // 2 + 1]):
        path.write_bytes(wrong)
        assert f"{path} is no {kind.title()} file, or not all of one" in refused()
    write(pa.table({"url": ["a"], "n": [1]}), path)
    assert "no column of encoded images: its columns are url string, n int64" in refused()
    write(pa.table({"a": [b"1"], "b": [b"2"]}), path)
    assert "several columns of images (a, b)" in refused()
    write(pa.table({"jpg": IMAGES}), tmp_path / f"train-0.{kind}")
    write(pa.table({"jpg": IMAGES}), tmp_path / f"test-0.{kind}")
    assert f"name the one to train on, {tmp_path}/train-*.{kind}" in refused()


def test_compressed_arrow_is_refused(tmp_path: Path) -> None:
    table = pa.table({"jpg": [bytes(1000)] * 50})
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema, options=packed) as out:
        out.write_table(table)
    with pytest.raises(ConfigError, match="holds compressed batches"):
        open_rows("arrow", str(tmp_path), MANY)


def test_memory_is_bounded_and_a_group_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(pa.table({"jpg": IMAGES}), tmp_path / "a.parquet")
    source = open_rows("parquet", str(tmp_path), MANY)
    read: list[int] = []
    original = module.ParquetGroups.read

    def counted(self: module.ParquetGroups, group: int, column: str) -> Any:
        read.append(group)
        return original(self, group, column)

    monkeypatch.setattr(module.ParquetGroups, "read", counted)
    monkeypatch.setattr(module, "_HELD_BYTES", 2 * sum(len(data) for data in IMAGES[42:49]))
    for sample in (0, 8, 1, 9, 0):
        source.read(sample)
    assert read == [0, 1]
    for sample in range(N):
        source.read(sample)
    assert read == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sum(column.nbytes for column in source._held.values()) <= module._HELD_BYTES
    source.read(0)
    assert read[-1] == 0, "the oldest group was let go"


def test_the_index_is_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(pa.table({"jpg": IMAGES}), path)
    first = open_rows("parquet", str(path), MANY)
    before = fingerprint(first)
    with monkeypatch.context() as patch:
        patch.delattr(module, "_scan")
        again = open_rows("parquet", str(path), MANY)
    assert again.fingerprint() == first.fingerprint()
    write_parquet(pa.table({"jpg": [*IMAGES[:-1], encoded(99)]}), path)
    with pytest.raises(OSError, match="has changed since it was indexed"):
        pickle.loads(pickle.dumps(first)).read(0)
    changed = open_rows("parquet", str(path), MANY)
    assert changes(before, fingerprint(changed), changed).startswith("1 replaced: ")
    assert str(path) in changes(before, fingerprint(changed), changed)


def test_threads_share_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_BYTES", 1)
    write_parquet(pa.table({"jpg": IMAGES}), tmp_path / "a.parquet")
    source = open_rows("parquet", str(tmp_path), MANY)
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(N).tolist()
        wrong.extend(n for n in order if source.read(n) != IMAGES[n])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@EVERY
def test_labels_serve_evaluation(
    tmp_path: Path, kind: str, write: Callable[[Any, Path], None]
) -> None:
    numbers = [n % 2 for n in range(N)]
    write(hub_table(IMAGES, numbers), tmp_path / f"a.{kind}")
    images = LabelledImages(tmp_path / f"a.{kind}", resize=16, image_size=16, max_images=10)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [n % 2 for n in range(0, N, 5)]
    images.keep([1, 3])
    assert [images.read(i) for i in range(2)] == [IMAGES[5], IMAGES[15]]
    assert images.name(1) == f"{tmp_path}/a.{kind}:row 15"
    assert images.stamp(1) == [os.path.getsize(tmp_path / f"a.{kind}"), images.stamp(0)[1]]
    words = ["b" if n % 2 else "a" for n in range(N)]
    write(pa.table({"jpg": IMAGES, "label": words}), tmp_path / f"b.{kind}")
    assert open_rows(kind, str(tmp_path / f"b.{kind}"), MANY).labels() == (numbers, ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, -1], "has no label in row 1"),
        ([0, None], "has no label in row 1"),
        ([0, 2], "has label 2, but names of 2 classes"),
        (None, r"has no column of labels \(thumbnail binary, image struct.*name it label"),
    ],
)
def test_missing_labels_are_refused(
    tmp_path: Path, labels: list[int] | None, sentence: str
) -> None:
    write_parquet(hub_table(IMAGES[:2], labels), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=sentence):
        open_rows("parquet", str(tmp_path), MANY).labels()


def test_a_folder_of_save_to_disk_with_its_splits(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("test", 10)):
        folder = tmp_path / split
        folder.mkdir()
        write_stream(hub_table(IMAGES[:count], [0, 1] * (count // 2)), folder / "data-0.arrow")
        write_stream(pa.table({"indices": [1]}), folder / "cache-1.arrow")
        (folder / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
        )
    data = DataConfig(source="arrow", root=str(tmp_path))
    config = resolve_folders(Config(run=RunConfig(), data=data, knn=KnnConfig(every=1)))
    source = open_source(config)
    assert isinstance(source, RowSource)
    assert len(source.sizes) == 30
    test = LabelledImages(Path(config.knn.test_root), resize=16, image_size=16)
    assert len(test) == 10


def test_a_table_beside_class_folders_is_no_root_of_rows(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").touch()
    assert kind_of(str(tmp_path)) == "parquet"
    (tmp_path / "cat").mkdir()
    assert kind_of(str(tmp_path)) == ""
