"""The fingerprint of a data set: what it notices, what it does not mind, and what it says."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import Config, DataConfig
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.fingerprint import changes, fingerprint
from fastmoco.data.sources.source import Source

Images = dict[str, bytes]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))


def picture(seed: int, side: int = 16, width: int = 0) -> bytes:
    shape = (side, width or side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def in_folder(place: Path, images: Images) -> Source:
    for name, data in images.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return open_source(Config(data=DataConfig(root=str(place))))


def in_list(place: Path, images: Images) -> Source:
    in_folder(place, images)
    (place / "list.txt").write_text("\n".join(images))
    return open_source(Config(data=DataConfig(source="list", root=str(place / "list.txt"))))


def in_shards(place: Path, images: Images) -> Source:
    place.mkdir(parents=True)
    names = list(images)
    for at in range(0, len(names), 4):
        with tarfile.open(place / f"{at:03d}.tar", "w") as tar:
            for name in names[at : at + 4]:
                member = tarfile.TarInfo(name)
                member.size = len(images[name])
                tar.addfile(member, io.BytesIO(images[name]))
    return open_source(Config(data=DataConfig(source="shards", root=str(place))))


KINDS: list[Callable[[Path, Images], Source]] = [in_folder, in_list, in_shards]
TEN = {f"{n % 2}/{n}.png": picture(n) for n in sorted(range(10), key=lambda n: n % 2)}


def told(make: Callable[[Path, Images], Source], tmp_path: Path, now: Images) -> str:
    before, after = make(tmp_path / "then", TEN), make(tmp_path / "elsewhere", now)
    text = changes(fingerprint(before), fingerprint(after), after)
    return text.replace(str(tmp_path / "elsewhere") + os.sep, "")


@pytest.mark.parametrize("make", KINDS)
def test_a_copy_elsewhere_is_the_same_data_set(
    make: Callable[[Path, Images], Source], tmp_path: Path
) -> None:
    assert told(make, tmp_path, TEN) == ""


@pytest.mark.parametrize("make", [in_folder, in_list])
def test_what_came_went_or_has_another_name_is_named(
    make: Callable[[Path, Images], Source], tmp_path: Path
) -> None:
    now = {name: data for name, data in TEN.items() if name != "0/4.png"}
    now |= {f"1/x{n}.png": picture(20 + n) for n in range(5)}
    assert told(make, tmp_path, now) == "5 added: 1/x0.png, 1/x1.png, 1/x2.png and 2 more; 1 gone"


def test_a_member_of_a_shard_that_grew_is_named(tmp_path: Path) -> None:
    assert told(in_shards, tmp_path, {**TEN, "1/y.png": picture(99)}) == "1 added: 008.tar:1/y.png"


@pytest.mark.parametrize("make", KINDS)
def test_an_image_of_another_size_is_replaced(
    make: Callable[[Path, Images], Source], tmp_path: Path
) -> None:
    text = told(make, tmp_path, {**TEN, "1/9.png": picture(9, side=17)})
    if make is in_shards:  # its place and length are its name there
        assert text == "1 added: 008.tar:1/9.png; 1 gone"
    else:
        assert text == "1 replaced: 1/9.png"


@pytest.mark.parametrize("make", KINDS)
def test_other_pixels_of_the_same_size_are_seen_in_the_files_that_are_read(
    make: Callable[[Path, Images], Source], tmp_path: Path
) -> None:
    data = bytearray(TEN["1/3.png"])
    data[-20] ^= 1
    text = told(make, tmp_path, {**TEN, "1/3.png": bytes(data)})
    assert text == f"1 replaced: {'004.tar:' * (make is in_shards)}1/3.png"


def test_the_order_of_a_list_counts(tmp_path: Path) -> None:
    text = told(in_list, tmp_path, dict(reversed(TEN.items())))
    assert text == "the 10 images stand in another order or another number of times"


@pytest.mark.parametrize("make", [in_folder, in_list])
def test_an_image_that_became_unreadable_keeps_its_number(
    make: Callable[[Path, Images], Source], tmp_path: Path
) -> None:
    assert told(make, tmp_path, {**TEN, "1/9.png": b""}) == ""


def test_several_roots_are_compared_below_what_they_share(tmp_path: Path) -> None:
    found = []
    for place in (tmp_path / "a", tmp_path / "b"):
        in_folder(place, TEN)
        found.append(open_source(Config(data=DataConfig(root=str(place / "*")))))
    assert changes(fingerprint(found[0]), fingerprint(found[1]), found[1]) == ""


def test_a_size_is_seen_of_every_image_also_of_those_that_are_not_read(tmp_path: Path) -> None:
    many = {f"{n:03d}.png": picture(0, 4, 6) for n in range(130)}  # those with odd numbers are not
    first = in_folder(tmp_path / "then", many)
    for number, (height, width) in enumerate([(5, 6), (4, 7), (6, 4)]):
        other = in_folder(tmp_path / f"{number}", {**many, "001.png": picture(0, height, width)})
        text = changes(fingerprint(first), fingerprint(other), other)
        assert text == f"1 replaced: {tmp_path / f'{number}' / '001.png'}"


def test_few_files_are_read_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_folder(tmp_path, {f"{n:03d}.png": picture(0, 4) for n in range(200)})
    read: list[int] = []
    whole = type(source).read

    def watched(self: Source, sample: int) -> bytes:
        read.append(sample)
        return bytes(whole(self, sample))

    monkeypatch.setattr(type(source), "read", watched)
    found = fingerprint(source)
    assert len(set(read)) == len(read) == len(found.contents) == 64
    assert min(read) < 4
    assert max(read) > 190
