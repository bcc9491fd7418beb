"""Tar shards of every writer: `tarfile` is the truth about names and bytes of members."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmoco.config import ConfigError
from fastmoco.data.sources.shards import open_shards
from tests.support.data.tar_files import LIMIT, add, content, jpeg, link, truth, write

LONG = ["a" * 90 + "/" + "b" * 90 + ".jpg", "c/" * 150 + "d.jpg", "é" * 80 + ".jpg", "x.jpg"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_format(tmp_path: Path, form: int) -> None:
    names = LONG[:1] + LONG[3:] if form == tarfile.USTAR_FORMAT else LONG
    shard = write(tmp_path / "0.tar", names, form)
    source = open_shards(str(shard), LIMIT)
    assert content(source) == truth(shard)
    assert [name for name, _ in content(source)] == names
    assert (source.notes, source.warnings, source.bad) == ([], [], {})


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar is the writer")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_archives_of_gnu_tar_with_links_of_both_kinds(tmp_path: Path, form: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for number in range(4):
        (root / "a" / f"{number}.jpg").write_bytes(jpeg(number))
    os.link(root / "a" / "1.jpg", root / "a" / "hard.jpg")
    os.symlink("a/2.jpg", root / "soft.jpg")
    os.symlink("../soft.jpg", root / "a" / "twice.jpg")
    shard = tmp_path / "0.tar"
    command = ["tar", f"--format={form}", "--sort=name", "-cf", str(shard), "-C", str(root), "."]
    subprocess.run(command, check=True)
    source = open_shards(str(shard), LIMIT)
    assert content(source) == truth(shard)
    assert len(source.sizes) == 7
    assert not source.bad


LIBARCHIVE = ["bsdtar", "-cf", "{out}", "--format={form}", "."]
CMAKE = ["cmake", "-E", "tar", "cf", "{out}", "--format={form}", "."]  # libarchive too


@pytest.mark.parametrize("form", ["gnutar", "pax"])
def test_archives_of_libarchive(tmp_path: Path, form: str) -> None:
    command = next((c for c in (LIBARCHIVE, CMAKE) if shutil.which(c[0])), None)
    if command is None:
        pytest.skip("bsdtar or cmake is the writer")
    root, shard = tmp_path / "root", tmp_path / "0.tar"
    (root / "l" / ("l" * 120)).mkdir(parents=True)
    for number, name in enumerate(("1.jpg", "l/2.JPG", f"l/{'l' * 120}/é.jpg")):
        (root / name).write_bytes(jpeg(number))
    os.symlink("l/2.JPG", root / "soft.jpg")
    words = [word.format(out=shard, form=form) for word in command]
    subprocess.run(words, check=True, cwd=root)
    source = open_shards(str(shard), LIMIT)
    assert sorted(content(source)) == sorted(truth(shard))
    assert len(source.sizes) == 4
    assert (source.bad, source.warnings) == ({}, [])


def test_archives_of_macos_with_its_companions(tmp_path: Path) -> None:
    """As bsdtar writes them there: AppleDouble members, and keys of its own in pax headers."""
    own = {
        "LIBARCHIVE.creationtime": "1700000000.5",
        "SCHILY.dev": "16777234",
        "SCHILY.nlink": "1",
        "LIBARCHIVE.xattr.com.apple.quarantine": "MDA4MTs=",
        "mtime": "1700000000.123456789",
    }
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(("a/1.jpg", "a/2.jpg")):
            add(tar, name.replace("/", "/._"), b"\0\5\x16\7\0\2\0\0Mac OS X        ", **own)
            add(tar, name, jpeg(number), **own)
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert content(source) == [("a/1.jpg", jpeg(0)), ("a/2.jpg", jpeg(1))]
    assert (source.notes, source.warnings, source.bad) == ([], [], {})


def test_archives_of_img2dataset(tmp_path: Path) -> None:
    """Byte for byte as its writer (1.47 on webdataset 1.0) makes them, files beside included."""
    with tarfile.open(tmp_path / "00000.tar", "w|") as tar:
        for number in (0, 2):  # 1 could not be downloaded
            told = json.dumps({"url": f"http://x/{number}.png", "status": "success"}, indent=4)
            parts = {"jpg": jpeg(number), "json": told.encode(), "txt": b"a caption"}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size, member.mode, member.mtime = len(data), 0o444, 1795721011.730333
                member.uname = member.gname = "bigdata"
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = open_shards(str(tmp_path), LIMIT)
    assert content(source) == [("000000000.jpg", jpeg(0)), ("000000002.jpg", jpeg(2))]
    assert source.notes == ["members not counted as images: 2 .json, 2 .txt"]
    assert (source.warnings, source.bad) == ([], {})


def test_links_that_lead_out_or_in_a_circle_are_bad_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "1.jpg", jpeg(1))
        link(tar, "2.jpg", "../elsewhere.jpg", tarfile.SYMTYPE)
        link(tar, "3.jpg", "4.jpg", tarfile.SYMTYPE)
        link(tar, "4.jpg", "3.jpg", tarfile.SYMTYPE)
        link(tar, "5.jpg", "6.jpg", tarfile.SYMTYPE)  # to a later member
        add(tar, "6.jpg", jpeg(6))
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert source.bad == {
        1: "a link to ../elsewhere.jpg, which is not in the archive",
        2: "a link to 4.jpg, which is not in the archive",
        3: "a link to 3.jpg, which is not in the archive",
    }
    assert source.read(4) == source.read(5) == jpeg(6)


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar is the writer")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused_by_name_and_the_others_read(tmp_path: Path, form: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("1.jpg", "3.jpg"):
        (root / name).write_bytes(jpeg(1))
    with open(root / "2.jpg", "wb") as file:
        file.write(jpeg(2))
        file.truncate(1 << 20)
    command = ["tar", f"--format={form}", "-S", "--sort=name", "-cf", str(tmp_path / "0.tar")]
    subprocess.run([*command, "-C", str(root), "."], check=True)
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert source.bad == {1: "a sparse member: pack it again without --sparse"}
    assert source.read(0) == source.read(2) == jpeg(1)
    assert source.name(1).endswith("0.tar:./2.jpg")
    assert source.warnings == []


def test_what_macos_adds_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        xattr = {"LIBARCHIVE.xattr.com.apple.quarantine": "MDA4MQ", "SCHILY.fflags": "hidden"}
        for name in ("./._a", "./a/._1.jpg", "__MACOSX/a/1.jpg", "./a/.DS_Store", ".x/1.jpg"):
            add(tar, name, jpeg(9), **xattr)
        add(tar, "./a/1.JPG", jpeg(1), **xattr)
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert content(source) == [("./a/1.JPG", jpeg(1))]
    assert source.notes == []


def test_a_hard_link_is_to_what_came_before_it(tmp_path: Path) -> None:
    """A name may come twice, as `tar --append` leaves it: a hard link is to the earlier one."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "1.jpg", jpeg(1))
        link(tar, "2.jpg", "1.jpg", tarfile.LNKTYPE)
        add(tar, "1.jpg", jpeg(3))
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert content(source) == truth(tmp_path / "0.tar")
    assert source.read(1) == jpeg(1)


def test_one_picture_per_webdataset_key(tmp_path: Path) -> None:
    names = [
        *("0001.mask.png", "0001.png", "0001.jpg", "0001.json"),
        *("a/0001.seg.png", "a/0001.webp"),
        *("img.01.jpg", "img.02.jpg"),  # no plain suffix: two pictures
        *("b/7.png", "c/7.jpg"),  # other folders, other keys
        *("8.jpg", "8.png"),  # a JPEG goes first wherever it stands
    ]
    write(tmp_path / "0.tar", names)
    source = open_shards(str(tmp_path / "0.tar"), LIMIT)
    assert [name for name, _ in content(source)] == [
        *("0001.jpg", "a/0001.webp", "img.01.jpg", "img.02.jpg", "b/7.png", "c/7.jpg", "8.jpg")
    ]
    assert [data for _, data in content(source)] == [jpeg(i) for i in (2, 5, 6, 7, 8, 9, 10)]
    assert source.notes[0] == "members not counted as images: 1 .json"
    assert source.notes[1].startswith("4 pictures have the key of another and are left out")


def test_members_by_content(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0a1b", jpeg(1, "PNG"))
        add(tar, "0c1d", b"no picture")
    with pytest.raises(ConfigError, match=r"2 none\); data\.any_name true counts"):
        open_shards(str(tmp_path / "0.tar"), LIMIT)
    source = open_shards(str(tmp_path / "0.tar"), LIMIT, any_name=True)
    assert content(source) == [("0a1b", jpeg(1, "PNG"))]
    assert source.notes == ["members not counted as images: 1 none"]


@pytest.mark.parametrize(
    ("name", "pack", "told"),
    [
        ("0.tar.gz", gzip.compress, r"gzip.*`gunzip \S+/0\.tar\.gz`"),
        ("0.TGZ", gzip.compress, r"gzip.*`gunzip \S+/0\.TGZ`"),
        ("0.tar", gzip.compress, r"gzip.*`mv \S+/0\.tar \S+/0\.tar\.gz && gunzip \S+/0\.tar\.gz`"),
        ("0.tar.xz", lambda data: b"\xfd7zXZ\0" + data, r"xz.*`unxz "),
        ("0.tar", lambda data: b"no archive" + data, "is no tar file: it starts with b'no archi'"),
    ],
)
def test_compressed_shards_are_refused_with_the_command(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], told: str
) -> None:
    write(tmp_path / "good" / "1.tar", ["1.jpg"])
    data = write(tmp_path / "x.tar", ["0.jpg"]).read_bytes()
    (tmp_path / "good" / name).write_bytes(pack(data))
    for root in (tmp_path / "good", tmp_path / "good" / name):
        with pytest.raises(ConfigError, match=told) as caught:
            open_shards(str(root), LIMIT)
        assert "\n" not in str(caught.value)
    if name == "0.tar.gz":  # unpacked beside
        (tmp_path / "good" / "0.tar").write_bytes(data)
        assert len(open_shards(str(tmp_path / "good"), LIMIT).sizes) == 2


def test_upper_case_hidden_and_linked_shards(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.TAR", ["1.jpg"])
    write(tmp_path / "in" / "._b.tar", ["2.jpg"])
    write(tmp_path / "in" / ".c.tar", ["2.jpg"])
    write(tmp_path / "out" / "d.tar", ["3.jpg", "4.jpg"])
    os.symlink(tmp_path / "out", tmp_path / "in" / "link")
    os.symlink(tmp_path / "in", tmp_path / "out" / "back")
    os.mkfifo(tmp_path / "in" / "pipe.tar")
    (tmp_path / "in" / "00000_stats.json").touch()
    source = open_shards(str(tmp_path / "in"), LIMIT)
    assert source.shard_sizes.tolist() == [1, 2]
    assert "pipe.tar (a FIFO)" in source.warnings[0]
    assert len(open_shards(f"{tmp_path}/{{in/a.TAR,out/?.tar}}", LIMIT).sizes) == 3
    with pytest.raises(ConfigError, match=r"e\.tar does not exist"):
        open_shards(f"{tmp_path}/out/{{d,e}}.tar", LIMIT)


def test_archives_one_after_another(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}.tar", [f"{n}/{i}.jpg" for i in range(2)]) for n in range(3)]
    both = tmp_path / "all" / "0.tar"
    both.parent.mkdir()
    both.write_bytes(b"".join(part.read_bytes() for part in parts) + b"a signature")
    source = open_shards(str(both), LIMIT)
    assert content(source) == [row for part in parts for row in truth(part)]
    assert source.warnings == []


def test_global_headers_end_with_their_archive(tmp_path: Path) -> None:
    """A pax header for all members, as `git archive` writes one, says nothing of the next part."""
    one, two = tmp_path / "one.tar", write(tmp_path / "two.tar", ["2.jpg"])
    with tarfile.open(one, "w", pax_headers={"path": "everything.jpg"}) as tar:
        tar.addfile(tarfile.TarInfo("folder"), None)
    joined = tmp_path / "all" / "0.tar"
    joined.parent.mkdir()
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    assert content(open_shards(str(joined), LIMIT))[1:] == truth(two)


def test_a_long_end_of_zeros_is_passed_over(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", ["1.jpg"])
    with open(shard, "r+b") as file:
        file.truncate((1 << 20) * 9 + 512)
        file.seek(0, os.SEEK_END)
        file.write(write(tmp_path / "1.tar", ["2.jpg"]).read_bytes())
    assert [name for name, _ in content(open_shards(str(shard), LIMIT))] == ["1.jpg", "2.jpg"]


def test_a_tar_of_tars(tmp_path: Path) -> None:
    """As the training set of ImageNet comes."""
    inner = [write(tmp_path / f"n{n}.tar", [f"n{n}_{i}.JPEG" for i in range(3)]) for n in range(2)]
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        for path in inner:
            tar.add(path, path.name)
    source = open_shards(str(tmp_path / "ILSVRC2012_img_train.tar"), LIMIT)
    assert [source.name(i).rpartition(":")[2] for i in (0, 5)] == [
        *("n0.tar/n0_0.JPEG", "n1.tar/n1_2.JPEG")
    ]
    assert [source.read(i) for i in range(6)] == [jpeg(i) for i in (0, 1, 2)] * 2
    assert (source.notes, source.warnings) == ([], [])


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/sh\xe4rds"))
    name = os.fsdecode(b"\xff/caf\xe9.jpg")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = write(folder / f"{form}.tar", [name], form)
        for _ in range(2):  # the second time from the index
            source = open_shards(str(shard), LIMIT)
            assert source.name(0) == f"{shard}:{name}"
            assert source.read(0) == jpeg(0)
