"""Buckets: the batches of local files, whatever the network does, or a sentence."""

from __future__ import annotations

import errno
import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.fingerprint import fingerprint
from fastmoco.data.sources.remote import cache as cache_module
from fastmoco.data.sources.remote import store as store_module
from fastmoco.data.sources.remote.cache import Cache
from fastmoco.data.sources.remote.store import Object, fetch, look
from fastmoco.data.sources.tables import parquet as parquet_source
from tests.support.data.far_store import FarStore

for module in ("s3fs", "moto", "pyarrow"):
    pytest.importorskip(module, reason="the extra remote, parquet or dev is not installed")


@pytest.fixture(scope="module")
def served() -> Iterator[FarStore]:
    with FarStore() as store:
        yield store


@pytest.fixture
def far(served: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarStore]:
    """The bucket, with an empty cache and short pauses."""
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "PAUSE_S", 0.001)
    served.spoil = lambda method, path, number: ""
    served.spoiled.clear()
    served.requests.clear()
    yield served
    served.spoil = lambda method, path, number: ""


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 shards of 5 photographs."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(photos.rglob("*.jpg"))
    for number in range(12):
        with tarfile.open(folder / f"{number:02d}.tar", "w") as tar:
            for path in files[5 * number : 5 * number + 5]:
                tar.add(path, path.name)
    return folder


def config(tmp_path: Path, root: str, **data: Any) -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), seed=3),
        data=DataConfig(root=root, backend="array", **{"source": "shards", "workers": 2, **data}),
        augment=AugmentConfig(image_size=24),
        optim=OptimConfig(global_batch_size=20),
    )


def batches(config: Config, first: int = 0, last: int = 5) -> list[torch.Tensor]:
    with build_loader(config, device=torch.device("cpu")) as loader:
        found = loader.batches(first, last)
        return [part for b in found for part in (b.im_q, b.im_k, torch.from_numpy(b.replaced))]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("source", ["shards", "parquet", "arrow"])
def test_a_bucket_gives_the_batches_of_the_local_files(
    source: str, far: FarStore, shards: Path, photos: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder = shards
    if source != "shards":
        folder = tmp_path / "tables"
        folder.mkdir()
        images = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
        for number in range(2):
            table = pa.table({"image": pa.array(images[30 * number : 30 * number + 30])})
            path = folder / f"{number}.{source}"
            if source == "parquet":
                parquet.write_table(table, path, row_group_size=8)
            else:
                with pa.ipc.new_stream(str(path), table.schema) as file:
                    file.write_table(table)
    local = config(tmp_path, str(folder), source=source)
    remote = config(tmp_path, far.put_folder(folder, f"same-{source}"), source=source)
    assert same(batches(remote), batches(local))
    assert same(batches(remote, 3), batches(local, 3))
    of_bucket, of_disk = (fingerprint(open_source(one)) for one in (remote, local))
    assert of_bucket.digest == of_disk.digest


@pytest.mark.parametrize("fault", ["500", "cut", "slow"])
def test_faults_do_not_change_the_samples(
    fault: str, far: FarStore, shards: Path, tmp_path: Path
) -> None:
    expected = batches(config(tmp_path, str(shards)))
    root = far.put_folder(shards, "faulty")
    every = 9 if fault == "slow" else 3
    far.spoil = lambda method, path, number: fault if number % every == 1 else ""
    remote = config(tmp_path, root, shuffle_window=20)
    windowed = batches(config(tmp_path, str(shards), shuffle_window=20))
    assert same(batches(remote), windowed)
    assert same(batches(config(tmp_path, root), 2), expected[6:])  # resumed in the middle
    assert fault in far.spoiled


def test_a_public_bucket_that_may_not_be_listed_is_read(
    far: FarStore, shards: Path, tmp_path: Path
) -> None:
    """S3 says 403, not 404, of the index that is not there."""
    root = f"{far.put_folder(shards, 'public')}/{{00..11}}.tar"
    far.spoil = lambda method, path, number: "403" * path.endswith(".fastmoco-index")
    assert same(batches(config(tmp_path, root)), batches(config(tmp_path, str(shards))))
    assert "403" in far.spoiled


def test_a_cache_that_holds_a_part_gives_the_same_samples_and_keeps_its_bound(
    far: FarStore, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = far.put_folder(shards, "bounded")
    largest = max(path.stat().st_size for path in shards.iterdir())
    limit = 8 * largest
    monkeypatch.setenv("FASTMOCO_REMOTE_GB", str(limit / 1e9))
    with pytest.raises(ConfigError, match=r"set data\.shuffle_window"):
        open_source(config(tmp_path, root))
    remote = config(tmp_path, root, shuffle_window=15)
    expected = batches(config(tmp_path, str(shards), shuffle_window=15), 0, 9)
    assert same(batches(remote, 0, 9), expected)
    kept = list((tmp_path / "cache" / "remote").glob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in kept) <= limit
    monkeypatch.setenv("FASTMOCO_REMOTE_GB", str(3 * largest / 1e9))
    with pytest.raises(ConfigError, match="needs room for 8 objects"):
        open_source(remote)


def test_what_is_wrong_with_an_object_is_said_by_its_own_name(
    far: FarStore, shards: Path, tmp_path: Path
) -> None:
    far.put("odd/0.tar", b"no archive" * 100)
    with pytest.raises(ConfigError, match=r"^The shard s3://images/odd/0\.tar is no tar file"):
        open_source(config(tmp_path, "s3://images/odd"))
    far.put("odd/0.parquet", b"no table" * 100)
    with pytest.raises(ConfigError, match=r"^s3://images/odd/0\.parquet cannot be read as Parquet"):
        open_source(config(tmp_path, "s3://images/odd", source="parquet"))
    far.put("odd/0.tar", (shards / "00.tar").read_bytes()[:-11000])
    cut = open_source(config(tmp_path, "s3://images/odd"))
    assert cut.warnings[0].startswith("s3://images/odd/0.tar is cut off")


@pytest.mark.parametrize("source", ["shards", "parquet", "arrow"])
def test_an_object_that_is_thrown_out_before_it_is_indexed_is_fetched_again(
    source: str, far: FarStore, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": [b"P5 2 2 255\n" + bytes(4)]})
    parquet.write_table(table, tmp_path / "0.parquet")
    with pa.ipc.new_stream(str(tmp_path / "0.arrow"), table.schema) as file:
        file.write_table(table)
    path = shards / "00.tar" if source == "shards" else tmp_path / f"0.{source}"
    far.put(f"out-{source}/0{path.suffix}", path.read_bytes())
    fetched, thrown = Cache.path, list[Path]()

    def thrown_out(self: Cache, one: Object) -> Path:
        place = fetched(self, one)
        if not thrown:
            thrown.append(place)
            place.unlink()
        return place

    monkeypatch.setattr(Cache, "path", thrown_out)
    found = open_source(config(tmp_path, f"s3://images/out-{source}", source=source))
    assert not found.bad
    assert len(found.sizes) == (5 if source == "shards" else 1)
    assert thrown


def test_an_object_that_is_thrown_out_while_it_is_indexed_has_no_bad_rows(
    far: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": [b"P5 2 2 255\n" + bytes(4)]}), tmp_path / "0.parquet")
    far.put("while/0.parquet", (tmp_path / "0.parquet").read_bytes())
    measure, thrown = parquet_source._measure, list[Path]()

    def thrown_out(task: parquet_source.Group, max_pixels: int) -> object:
        if not thrown:
            thrown.append(Path(task[0]))
            thrown[0].unlink()
        return measure(task, max_pixels)

    monkeypatch.setattr(parquet_source, "_measure", thrown_out)
    assert not open_source(config(tmp_path, "s3://images/while", source="parquet")).bad
    assert thrown


def test_an_object_that_changes_is_refused_and_not_replaced(
    far: FarStore, shards: Path, tmp_path: Path
) -> None:
    root = far.put_folder(shards, "changing")
    remote = config(tmp_path, root)
    source = open_source(remote)
    for path in (tmp_path / "cache" / "remote").glob("*.tar"):
        path.unlink()
    other = (shards / "05.tar").read_bytes()
    far.put("changing/03.tar", other[:-1] + b"x")
    assert source.read(0)
    with pytest.raises(ConfigError, match=r"changing/03\.tar has changed since"):
        source.read(16)
    with (
        pytest.raises(ConfigError, match=r"^s3://images/changing/03\.tar has changed since"),
        build_loader(remote, source, device=torch.device("cpu")) as loader,
    ):
        list(loader.batches(0, 3))


def test_a_store_that_stays_broken_ends_in_a_sentence(far: FarStore, tmp_path: Path) -> None:
    url = far.put("broken.tar", b"x" * 1000)
    one = look(url)
    far.spoil = lambda method, path, number: "500" * (method == "GET")
    with (
        open(tmp_path / "x", "wb") as file,
        pytest.raises(ConfigError, match=r"broken\.tar cannot be read, 8 times in a row"),
    ):
        fetch(one, file)
    far.spoil = lambda method, path, number: ""
    with pytest.raises(ConfigError, match="does not exist"):
        look(f"{url}.gone")


def test_a_wrong_checksum_is_refused(far: FarStore, tmp_path: Path, monkeypatch: Any) -> None:
    one, damage = look(far.put("sum.tar", bytes(1000))), itertools.count()
    monkeypatch.setattr(store_module, "_piece", lambda one, start: b"%1000d" % next(damage))
    with (
        open(tmp_path / "x", "wb") as file,
        pytest.raises(ConfigError, match="another checksum than its ETag"),
    ):
        fetch(one, file)


def test_an_etag_that_is_no_checksum_is_found_out_once(
    far: FarStore, tmp_path: Path, monkeypatch: Any
) -> None:
    """With keys of KMS, S3 gives ETags that look like an MD5."""
    known = store_module._object
    opaque = lambda url, info: known(url, info)._replace(tag="0123456789abcdef" * 2)  # noqa: E731
    monkeypatch.setattr(store_module, "_object", opaque)
    monkeypatch.setattr(store_module, "_OPAQUE", set())
    for number, times in enumerate((2, 1)):
        one = look(far.put(f"kms/{number}.tar", bytes([number]) * 1000))
        far.requests.clear()
        with open(tmp_path / "x", "wb") as file:
            fetch(one, file)
        assert (tmp_path / "x").read_bytes() == bytes([number]) * 1000
        assert [method for method, _ in far.requests].count("GET") == times


def test_a_full_disk_gives_up_old_objects_first_and_then_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 250

    def fetched(one: Object, into: BinaryIO) -> None:
        used = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
        if used + one.size > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        into.write(bytes(one.size))

    monkeypatch.setattr(cache_module, "fetch", fetched)
    cache = Cache(tmp_path, limit=10_000)
    objects = [Object(f"s3://b/{number}.tar", 100, str(number)) for number in range(3)]
    for at, one in enumerate(objects):
        os.utime(cache.path(one), (at, at))
    assert [cache.place(one).exists() for one in objects] == [False, True, True]
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        cache.path(Object("s3://b/large.tar", 300, ""))
    assert not list(tmp_path.glob("*.part"))
