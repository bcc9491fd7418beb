"""Files of several splits below one root: never mixed unless the root names them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastmoco.config import Config, ConfigError, DataConfig
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.remote import source as remote
from fastmoco.data.sources.remote.store import Object
from fastmoco.data.sources.shards import open_shards
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables.arrow import open_arrow
from fastmoco.data.sources.tables.parquet import open_parquet
from tests.support.data.images import png

LIMIT = 10**8
LAYOUTS = [
    ("train-00000-of-00001", "test-00000-of-00001", "{root}/train*{suffix}"),
    ("imagenet1k-train-00", "imagenet1k-validation-00", "{root}/imagenet1k-train*{suffix}"),
    ("default/train/0000", "default/test/0000", "{root}/default/train"),  # the hub converts to it
    ("c/partial-train/0000", "c/partial-validation/0000", "{root}/c/partial-train"),
    ("train/data-00000-of-00001", "test/data-00000-of-00001", "{root}/train"),  # save_to_disk
    ("a/Training/x", "b/val-x", "{root}/a/Training"),
    ("test-0", "val-0", "{root}/test*{suffix}"),
]


def write(path: Path, pictures: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png(np.full((3, 4, 3), number, np.uint8)) for number in range(pictures)]
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate(images):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return
    pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    table = pa.table({"image": images})
    if path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)


def opened(suffix: str, root: str) -> Source:
    if suffix == ".tar":
        return open_shards(root, LIMIT)
    return open_parquet(root, LIMIT) if suffix == ".parquet" else open_arrow(root, LIMIT)


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".arrow"])
@pytest.mark.parametrize(("one", "other", "such"), LAYOUTS)
def test_splits_in_files_and_folders_are_refused_with_one_to_name(
    suffix: str, one: str, other: str, such: str, tmp_path: Path
) -> None:
    root = tmp_path / "test" / "train"  # what lies above tells nothing
    write(root / f"{one}{suffix}", 2)
    assert len(opened(suffix, str(root)).sizes) == 2
    write(root / f"{other}{suffix}", 3)
    such = such.format(root=root, suffix=suffix)
    with pytest.raises(ConfigError, match=r"holds the splits .* and ") as refused:
        opened(suffix, str(root))
    assert str(refused.value).endswith(f"name one of them, such as {such}.")
    assert len(opened(suffix, such).sizes) == 2
    both = f"{root}/{{{one},{other}}}{suffix}"
    assert len(opened(suffix, both).sizes) == 5  # both were named


def test_names_that_only_hold_the_word_of_a_split_are_of_none(tmp_path: Path) -> None:
    for name in ("trains/0.tar", "testimony-0.tar", "valley.tar", "trainval.tar", "train-0.tar"):
        write(tmp_path / name, 1)
    assert len(opened(".tar", str(tmp_path)).sizes) == 5


def test_splits_of_a_bucket_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"s3://b/data/{split}-0.tar" for split in ("test", "train")]
    monkeypatch.setattr(remote, "listed", lambda root, suffix: [Object(u, 9, "") for u in urls])
    with pytest.raises(ConfigError, match=r"splits test and train.* s3://b/data/train\*\.tar\.$"):
        open_source(Config(data=DataConfig(root="s3://b/data", source="shards")))
