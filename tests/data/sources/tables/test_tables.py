"""Parquet and Arrow: the same batches as from files, and odd tables said in a sentence."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.fingerprint import changes, fingerprint
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables import parquet
from fastmoco.data.sources.tables.columns import Column
from fastmoco.data.sources.tables.labels import is_table, labels_in
from fastmoco.evaluate.labelled_images import LabelledImages

pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
IMAGE = "struct"
LIMIT = 10**8


def files_of(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.jpg"), key=lambda path: (str(path.parent), path.name))


def column(images: list[bytes | None], kind: str) -> Any:
    if kind == "binary":
        return pa.array(images, pa.binary())
    if kind == "large":
        return pa.array(images, pa.large_binary())
    rows = [None if image is None else {"bytes": image, "path": "x"} for image in images]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write(path: Path, images: list[bytes | None], kind: str = IMAGE, **others: Any) -> Path:
    """A table of few rows per row group or record batch, by the suffix of the path."""
    table = pa.table({"image": column(images, kind), **others})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
        return path
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=7)
    return path


def opened(source: str, root: Path | str, **more: Any) -> Source:
    return open_source(Config(data=DataConfig(source=source, root=str(root), **more)))  # type: ignore[arg-type]


def batches(tmp_path: Path, workers: int = 1, **data: Any) -> list[torch.Tensor]:
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run"), seed=3),
        data=DataConfig(workers=workers, **data),
        augment=AugmentConfig(image_size=24),
        optim=OptimConfig(global_batch_size=20),
    )
    with build_loader(config, device=torch.device("cpu")) as loader:
        return [view for batch in loader.batches(1, 5) for view in (batch.im_q, batch.im_k)]


@pytest.mark.parametrize("source", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_tables_hold_the_bytes_of_the_files(
    source: str, kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "KEPT_BYTES", 40_000)  # row groups are thrown out and read again
    images = [path.read_bytes() for path in files_of(photos)]
    write(tmp_path / f"a-0.{source}", [*images[:25]], kind)
    write(tmp_path / f"a-1.{source}", [*images[25:]], kind)
    folder = opened("folder", photos)
    for place in (tmp_path, tmp_path / f"a-*.{source}", tmp_path):  # the last from its index
        found = pickle.loads(pickle.dumps(opened(source, place)))
        assert (found.sizes == folder.sizes).all()
        assert found.shard_sizes.sum() == 60
        for sample in [*range(59, -1, -7), *range(60)]:
            assert found.read(sample) == images[sample]
    assert found.name(26).endswith(f"a-1.{source}:row 1")


@pytest.mark.parametrize("backend", ["array", "pil"])
@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_both_backends_deliver_the_batches_of_a_folder(
    source: str, backend: str, photos: Path, tmp_path: Path
) -> None:
    images = [path.read_bytes() for path in files_of(photos)]
    table = write(tmp_path / f"t.{source}", [*images])
    expected = batches(tmp_path, root=str(photos), backend=backend)
    found = batches(tmp_path, root=str(table), source=source, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_bad_rows_are_bad_samples_by_name(source: str, photos: Path, tmp_path: Path) -> None:
    good = files_of(photos)[0].read_bytes()
    table = write(tmp_path / f"t.{source}", [good, None, b"no image", b"", good])
    found = opened(source, table)
    assert set(found.bad) == {1, 2, 3}
    assert found.bad[1] == "null instead of an image"
    assert found.read(4) == good
    assert found.name(1) == f"{table}:row 1"


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_the_fingerprint_sees_a_row_that_came(source: str, photos: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in files_of(photos)]
    table = write(tmp_path / f"t.{source}", [*images[:9]])
    then = fingerprint(opened(source, table))
    assert not changes(then, fingerprint(opened(source, table)), opened(source, table))
    write(table, [*images[:10]])
    now = opened(source, table)
    assert "added" in changes(then, fingerprint(now), now)


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_labels_are_found_by_the_names_of_datasets_and_by_the_column(
    source: str, photos: Path, tmp_path: Path
) -> None:
    images = [path.read_bytes() for path in files_of(photos)[:4]]
    named = write(tmp_path / f"t.{source}", [*images], label=pa.array(["b", "a", "b", "c"]))
    found = LabelledImages(named, resize=24, image_size=24, max_images=2)
    assert found.class_names == ["a", "b", "c"]
    assert found.labels.tolist() == [1, 1]
    assert found.load(0, 2).shape == (2, 24, 24, 3)
    assert found.read(1) == images[2]
    feature = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    info = {"info": {"features": {"animal": feature, "image": {"_type": "Image"}}}}
    table = pa.table({"image": column([*images], IMAGE), "animal": pa.array([1, 1, 0, 1])})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path = tmp_path / f"u.{source}"
    if source == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    labelled = LabelledImages(path, resize=24, image_size=24)
    assert labelled.class_names == ["cat", "dog"]
    assert labelled.labels.tolist() == [1, 1, 0, 1]


def test_the_column_that_datasets_calls_an_image_is_taken(photos: Path, tmp_path: Path) -> None:
    """Though another one has bytes too, and a name that would decide."""
    one, other = (path.read_bytes() for path in files_of(photos)[:2])
    info = {"info": {"features": {"scan": {"_type": "Image"}, "image": {"dtype": "binary"}}}}
    table = pa.table({"image": column([other], "binary"), "scan": column([one], IMAGE)})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "t.parquet")
    assert opened("parquet", tmp_path / "t.parquet").read(0) == one


def test_a_damaged_row_group_is_bad_and_the_others_are_used(photos: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in files_of(photos)[:16]]
    table = write(tmp_path / "t.parquet", [*images])
    data = bytearray(table.read_bytes())
    second = pq.ParquetFile(table).metadata.row_group(1).column(0)
    at = second.dictionary_page_offset or second.data_page_offset
    data[at : at + 64] = bytes(64)
    table.write_bytes(data)
    source = opened("parquet", table)
    assert set(source.bad) == set(range(7, 14))
    assert all("row group 1 is damaged" in reason for reason in source.bad.values())
    assert [source.read(n) for n in (0, 6, 14, 15)] == [images[n] for n in (0, 6, 14, 15)]
    assert source.sizes[7:14].max() == 0 < source.sizes[14:].min()


@pytest.mark.parametrize("offset", [10**9, -1])
def test_an_arrow_file_that_leads_out_of_itself_is_refused(offset: int, tmp_path: Path) -> None:
    """Following it would end the process."""
    table = write(tmp_path / "t.arrow", [b"x" * 777] * 5)
    data = table.read_bytes()
    assert data.count(struct.pack("<3i", 777, 1554, 2331)) == 1
    data = data.replace(struct.pack("<3i", 777, 1554, 2331), struct.pack("<3i", 777, offset, 2331))
    table.write_bytes(data)
    with pytest.raises(ConfigError, match=r"t\.arrow cannot be read as Arrow"):
        opened("arrow", table)


def test_a_column_whose_name_is_no_text_is_refused(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.arrow", [files_of(photos)[0].read_bytes()], qqqq=pa.array([1]))
    table.write_bytes(table.read_bytes().replace(b"qqqq", b"\xffqqq"))
    with pytest.raises(ConfigError, match=r"t\.arrow has a column whose name is no text"):
        opened("arrow", table)


def test_a_row_group_without_all_of_its_rows_is_bad(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.parquet", [files_of(photos)[0].read_bytes()] * 3)
    sizes, _, bad = parquet._measure((str(table), 0, Column("image", "bytes"), 5), LIMIT)
    assert sizes.tolist() == [[0, 0]] * 5
    assert bad == dict.fromkeys(range(5), "row group 0 is damaged: it has 3 of 5 rows")


def test_labels_that_are_damaged_are_a_sentence(photos: Path, tmp_path: Path) -> None:
    """The images beside them may be whole."""
    images = [path.read_bytes() for path in files_of(photos)[:7]]
    table = write(
        tmp_path / "t.parquet", [*images], label=pa.array([f"class {n}" for n in range(7)])
    )
    data = bytearray(table.read_bytes())
    group = pq.ParquetFile(table).metadata.row_group(0)
    labels = next(c for n in range(3) if (c := group.column(n)).path_in_schema == "label")
    at = labels.dictionary_page_offset or labels.data_page_offset
    data[at : at + 16] = b"\xff" * 16
    table.write_bytes(data)
    assert not opened("parquet", table).bad
    with pytest.raises(ConfigError, match=r"The labels of .*t\.parquet cannot be read \("):
        labels_in(str(table), 7)


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_files_that_number_their_classes_in_another_order_are_refused(
    source: str, photos: Path, tmp_path: Path
) -> None:
    image = files_of(photos)[0].read_bytes()
    for number, names in enumerate((["cat", "dog"], ["cat", "dog"], ["dog", "cat"])):
        feature = {"_type": "ClassLabel", "names": names}
        info = {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}
        table = pa.table({"image": column([image], IMAGE), "label": pa.array([1])})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        if source == "parquet":
            pq.write_table(table, tmp_path / f"{number}.parquet")
        else:
            with pa.ipc.new_stream(str(tmp_path / f"{number}.arrow"), table.schema) as file:
                file.write_table(table)
    assert labels_in(f"{tmp_path}/{{0,1}}.{source}", 2) == ([1, 1], ["cat", "dog"])
    with pytest.raises(ConfigError, match=rf"2\.{source} and .*0\.{source} have other names of cl"):
        labels_in(str(tmp_path), 3)


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_a_table_that_is_replaced_during_a_run_is_not_read(
    source: str, photos: Path, tmp_path: Path
) -> None:
    images = [path.read_bytes() for path in files_of(photos)]
    one = write(tmp_path / f"a.{source}", [*images[:9]])
    opened_before = opened(source, tmp_path)
    write(one, [*images[9:18]])
    for before in (opened_before, pickle.loads(pickle.dumps(opened_before))):
        with pytest.raises(OSError, match=r"a\.\w+ was changed after it was indexed"):
            before.read(0)
    assert opened(source, tmp_path).read(0) == images[9]


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_other_pictures_of_the_same_sizes_are_another_set(source: str, tmp_path: Path) -> None:
    """What was found in them, such as the range of their pixels, is kept by the fingerprint."""
    first = opened(source, write(tmp_path / f"a.{source}", [b"P5 2 2 255\n" + bytes(4)] * 3))
    other = opened(source, write(tmp_path / f"b.{source}", [b"P5 2 2 255\n" + b"\xff" * 4] * 3))
    assert first.fingerprint() != other.fingerprint()
    again = opened(source, write(tmp_path / f"a.{source}", [b"P5 2 2 255\n" + b"\7" * 4] * 3))
    assert first.fingerprint() != again.fingerprint()


def test_a_folder_of_save_to_disk_leaves_caches_out(photos: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in files_of(photos)]
    write(tmp_path / "data-00000-of-00001.arrow", [*images[:5]])
    write(tmp_path / "cache-1234.arrow", [*images])
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert len(opened("arrow", tmp_path).sizes) == 5
    for text in ("{}", "no", '{"_data_files": [{"filename": 5}]}', "[" * 100_000):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ConfigError, match=r"state\.json does not name the files of a data set"):
            opened("arrow", tmp_path)


def test_what_cannot_be_trained_on_is_said_in_a_sentence(photos: Path, tmp_path: Path) -> None:
    good = files_of(photos)[0].read_bytes()
    table = write(tmp_path / "t.parquet", [good] * 9)
    data = bytearray(table.read_bytes())
    table.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"t\.parquet cannot be read as Parquet"):
        opened("parquet", table)
    arrow = write(tmp_path / "t.arrow", [good] * 9)
    arrow.write_bytes(arrow.read_bytes()[:-2000])
    with pytest.raises(ConfigError, match=r"t\.arrow cannot be read as Arrow"):
        opened("arrow", arrow)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="no column of images"):
        opened("parquet", tmp_path / "none.parquet")
    two = pa.table({"left": column([good], IMAGE), "right": column([good], IMAGE)})
    pq.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(ConfigError, match=r"several columns of images \(left, right\)"):
        opened("parquet", tmp_path / "two.parquet")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    single = pa.table({"image": column([good] * 3, IMAGE)})
    with pa.ipc.new_file(str(tmp_path / "z.arrow"), single.schema, options=options) as file:
        file.write_table(single)
    with pytest.raises(ConfigError, match="compressed"):
        opened("arrow", tmp_path / "z.arrow")


def test_a_table_beside_class_folders_describes_them(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").touch()
    (tmp_path / ".cache").mkdir()
    assert is_table(str(tmp_path))
    (tmp_path / "data").mkdir()
    assert is_table(str(tmp_path))
    (tmp_path / "cat").mkdir()
    assert not is_table(str(tmp_path))
