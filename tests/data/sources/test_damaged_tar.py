"""Tar shards that are cut, damaged or hostile: what is whole is read, and the rest is said."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from fastmoco.data.sources.shards import open_shards
from tests.support.data.tar_files import LIMIT, add, content, jpeg, link, truth, write


def header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


START = header("1.jpg", len(jpeg(0)), b"0") + jpeg(0) + bytes(-len(jpeg(0)) % 512)


@pytest.mark.parametrize(
    "damage",
    [
        b"".join(header("long", 4, b"L") + b"a.j\0" + bytes(508) for _ in range(2000)),
        header("of an unknown kind", 1 << 80, b"Z"),
        header("pax", 512, b"x") + b"9999999999999999999 path=a\n" + bytes(485),
    ],
    ids=["headers of headers", "a size", "a length"],
)
def test_damage_that_python_cannot_count_ends_a_shard(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(START + damage + bytes(1024))
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert content(source) == [("1.jpg", jpeg(0))]
    assert "its complete members are used" in source.warnings[0]


def test_a_header_that_claims_to_be_large_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = list[int](), os.pread

    def noted(file: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", noted)
    rest = b"\1" * (1 << 25)
    (tmp_path / "0.tar").write_bytes(START + header("pax", len(rest), b"x") + rest)
    assert len(open_shards(str(tmp_path / "0.tar"), LIMIT).sizes) == 1
    assert max(asked) <= 1 << 24


def test_a_row_of_links_without_an_end_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(1000):
            link(tar, f"{number:04d}.jpg", f"{number + 1:04d}.jpg", tarfile.SYMTYPE)
        add(tar, "1000.jpg", jpeg(1))
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert set(source.bad) == set(range(960))
    assert source.bad[0] == "a link to 0001.jpg, which is not in the archive"
    assert source.read(960) == source.read(1000) == jpeg(1)


def test_every_cut_keeps_the_complete_members_and_says_so(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole" / "0.tar", [f"{i}.jpg" for i in range(3)])
    data, expected = whole.read_bytes(), truth(whole)
    with tarfile.open(whole) as tar:
        ends = [member.offset_data + member.size for member in tar]
    write(tmp_path / "cut" / "good.tar", ["good.jpg"])
    for size in (0, 300, 600, *range(700, ends[-1] + 700, 401)):
        shard = tmp_path / "cut" / "0.tar"
        shard.write_bytes(data[:size])
        complete = sum(end <= size for end in ends)
        source = open_shards(str(shard.parent), LIMIT)
        assert content(source)[:-1] == expected[:complete]
        # Two blocks of zeros end an archive; one that is begun is taken as an end as well.
        marked = size > -(-ends[-1] // 512) * 512
        assert len(source.warnings) == (not marked), size
        if not marked:
            told = source.warnings[0]
            assert str(shard) in told
            assert any(how in told for how in ("is empty", "is cut off", "without the mark"))
            assert ("bytes (" in told) == (size > 0 and "without" not in told)
        (tmp_path / "cut" / "0.tar.fastmoco-index").unlink()


def test_damage_in_the_middle_keeps_what_is_before_it(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", [f"{i}.jpg" for i in range(3)])
    with tarfile.open(shard) as tar:
        at = tar.getmembers()[1].offset
    data = bytearray(shard.read_bytes())
    data[at : at + 512] = os.urandom(512)
    shard.write_bytes(data)
    source = open_shards(str(shard), LIMIT)
    assert [name for name, _ in content(source)] == ["0.jpg"]
    assert "is damaged: its complete members are used and" in source.warnings[0]


def test_a_cut_archive_of_archives(tmp_path: Path) -> None:
    inner = write(tmp_path / "in.tar", [f"{i}.jpg" for i in range(3)])
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(inner, "in.tar")
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: data.index(jpeg(1)) + 50])
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert content(source) == [("in.tar/0.jpg", jpeg(0))]
    assert "is cut off in in.tar/1.jpg" in source.warnings[0]
