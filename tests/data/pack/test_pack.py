"""Packs: which images are made smaller and how, what stands in a shard, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.pack import __main__ as pack
from fastmoco.data.pack.shard import Shard
from fastmoco.data.pack.shrink import Size, shrink
from fastmoco.data.pixels.rgb import ORIENTATION
from fastmoco.data.pixels.rule import RGB8, PixelRule
from fastmoco.data.sources import shards
from fastmoco.data.sources.index import load_index
from fastmoco.machine.owner import Owner
from tests.support.data.images import npy, png, tiff
from tests.support.runs.sessions import all_ended, begun, members

SIZE = Size(short_side=32, quality=90)


def encoded(mode: str, size: tuple[int, int], form: str = "JPEG", **options: object) -> bytes:
    """A picture whose upper left quarter is bright."""
    values = np.full((size[1], size[0], len(Image.new(mode, (1, 1)).getbands())), 40, np.uint8)
    values[: size[1] // 2, : size[0] // 2] = 200
    file = io.BytesIO()
    Image.fromarray(values.squeeze(), mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "size", "becomes", "mode_after"),
    [
        ("RGB", (100, 64), (50, 32), "RGB"),
        ("RGB", (64, 101), (32, 50), "RGB"),
        ("L", (640, 480), (43, 32), "L"),
        ("CMYK", (80, 64), (40, 32), "RGB"),
    ],
)
def test_a_large_image_gets_the_short_side(
    mode: str, size: tuple[int, int], becomes: tuple[int, int], mode_after: str
) -> None:
    packed = shrink(encoded(mode, size), SIZE, RGB8)
    with Image.open(io.BytesIO(packed.data)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", becomes, mode_after)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert ((packed.width, packed.height), packed.original) == (becomes, size)
    # As bright as before where it was bright, and as dark where it was dark.
    want = np.asarray(Image.open(io.BytesIO(encoded(mode, size))).convert("RGB")).astype(int)
    assert abs(pixels[:8, :8].mean() - want[:8, :8].mean()) < 2
    assert abs(pixels[-8:, -8:].mean() - want[-8:, -8:].mean()) < 2


def test_smaller_ones_and_those_that_no_jpeg_can_hold_keep_their_bytes() -> None:
    sixteen = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(sixteen, "PNG")
    for data, suffix in (
        (encoded("RGB", (32, 90)), ".jpg"),
        (encoded("RGB", (31, 31), "PNG"), ".png"),
        (encoded("RGBA", (64, 64), "PNG"), ".png"),
        (encoded("RGB", (64, 64), "PNG", transparency=(40, 40, 40)), ".png"),
        (sixteen.getvalue(), ".png"),
    ):
        packed = shrink(data, SIZE, RGB8)
        assert (packed.data, packed.suffix, packed.kept, packed.bad) == (data, suffix, True, "")


def test_pictures_of_other_depth_and_channels_keep_their_bytes() -> None:
    """Also colour of 16 bits, which PIL opens as if it had 8."""
    many = np.arange(40 * 36 * 13, dtype=np.uint16).reshape(40, 36, 13)
    for data, suffix, channels in (
        (png(many[..., :3]), ".png", 3),
        (tiff(many[..., :3], photometric="rgb"), ".tif", 3),
        (npy(many), ".npy", 13),
        (tiff(many.transpose(2, 0, 1), photometric="minisblack"), ".tif", 13),
    ):
        packed = shrink(data, SIZE, PixelRule(channels=channels))
        assert (packed.data, packed.suffix, packed.kept, packed.bad) == (data, suffix, True, "")
        assert (packed.width, packed.height) == (36, 40)
    assert shrink(npy(many), SIZE, RGB8).bad == "13 channels, but data.channels is 3"


def test_an_orientation_is_carried_over() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    packed = shrink(encoded("RGB", (96, 64), exif=exif), SIZE, PixelRule(exif="apply"))
    with Image.open(io.BytesIO(packed.data)) as image:
        assert (image.size, image.getexif()[ORIENTATION]) == ((48, 32), 6)
    plain = Image.open(io.BytesIO(shrink(encoded("RGB", (96, 64)), SIZE, RGB8).data))
    assert ORIENTATION not in plain.getexif()


@pytest.mark.parametrize("large", [True, False])
def test_a_bad_image_has_a_reason(large: bool) -> None:
    side = 300 if large else 30
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    assert "truncated" in shrink(file.getvalue()[:-200], SIZE, RGB8).bad
    assert "max_pixels" in shrink(file.getvalue(), SIZE, PixelRule(max_pixels=side)).bad
    assert shrink(b"not an image", SIZE, RGB8).bad


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven good images in two classes and a bad one."""
    root = tmp_path / "images"
    for number in range(11):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        side = 20 if number < 3 else 64 + number
        noise = np.random.default_rng(number).integers(0, 256, (side, 80, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.jpg")
    whole = (root / "dog" / "04.jpg").read_bytes()
    (root / "dog" / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def run(images: Path, out: Path, *more: str) -> int:
    fixed = ("--short-side", "32", "--shard-samples", "4")
    return pack.main([f"--data.root={images}", f"--out={out}", *fixed, *more])


def lines(out: Path) -> list[dict[str, object]]:
    texts = [path.read_text() for path in sorted(out.glob("*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_the_manifest_names_every_image_and_the_loader_reads_its_bytes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    assert run(images, out) == 0
    told = capsys.readouterr()
    assert "11 images, 3 of them with their own bytes" in told.out
    assert "1 images cannot be read" in told.err
    found = lines(out)
    names = sorted(path.relative_to(images).as_posix() for path in images.glob("*/*.jpg"))
    assert sorted(str(line["source"]) for line in found) == names
    assert [line["source"] for line in found] != names  # in an order of its own
    assert all(line["label"] == str(line["source"])[:3] for line in found)
    assert [line["source"] for line in found if "bad" in line] == ["dog/bad.jpg"]
    good = [line for line in found if "bad" not in line]
    source = shards.open_shards(str(out), RGB8.max_pixels)
    assert len(source.sizes) == len(good) == 11
    for sample, line in enumerate(good):
        data = source.read(sample)
        assert hashlib.sha256(data).hexdigest() == line["sha256"]
        assert source.name(sample).endswith(f":{line['member']}")
        with Image.open(io.BytesIO(data)) as image:
            assert list(image.size) == line["size"] == source.sizes[sample].tolist()
            assert min(image.size) <= 32
        if line["kept"]:
            assert data == (images / str(line["source"])).read_bytes()


@pytest.mark.parametrize("place", ["resumed", "images/a/pack", "images/cat/pack"])
def test_a_pack_that_was_interrupted_ends_with_the_same_bytes(
    place: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it lies in a folder of the images, before, after and among others."""
    whole, resumed = tmp_path / "whole", tmp_path / place
    assert run(images, whole) == 0
    written: list[str] = []
    write = Shard.write

    def fails(self: Shard, *arguments: object) -> None:
        if len(written) == 1:
            raise OSError(28, "No space left on device", str(self.tar))
        written.append(self.tar.name)
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "write", fails)
    assert run(images, resumed) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(Shard, "write", write)
    first = (resumed / "000000.tar").stat().st_mtime_ns
    assert run(images, resumed) == 0
    assert (resumed / "000000.tar").stat().st_mtime_ns == first
    for suffix in ("tar", "jsonl", "json"):
        for path in whole.glob(f"*.{suffix}"):
            assert (resumed / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(resumed)) == sorted(os.listdir(whole))


def test_a_pack_of_shards_does_not_pack_itself(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "shards"
    assert run(images, root) == 0
    more = (f"--data.root={root}", "--data.source=shards")
    assert run(images, root / "in" / "pack", *more) == 2
    told = capsys.readouterr().err
    assert f"--out {root}/in/pack lies in {root}, whose shards are packed" in told
    assert not (root / "in").exists()
    assert run(images, tmp_path / "pack", *more) == 0
    assert run(images, root / "in", f"--data.root={root}/*.tar", "--data.source=shards") == 0


def test_a_shard_without_its_manifest_is_written_again(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    assert run(images, out) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "000000.jsonl").unlink()
    (out / "000001.tar").write_bytes(before["000001.tar"][:-700])
    assert run(images, out) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == before
    assert len(lines(out)) == 12


def test_a_copied_pack_is_opened_by_its_index(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(images, tmp_path / "pack") == 0
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "pack", copy, copy_function=shutil.copyfile)
    scanned: list[str] = []
    scan = shards.scan_shard

    def counted(shard: Path, *arguments: object, **options: object) -> object:
        scanned.append(shard.name)
        return scan(shard, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "scan_shard", counted)
    assert len(shards.open_shards(str(copy), RGB8.max_pixels).sizes) == 11
    assert not scanned
    shutil.copyfile(copy / "000000.tar", copy / "000001.tar")  # not the one of its index
    shards.open_shards(str(copy), RGB8.max_pixels)
    assert scanned == ["000001.tar"]
    scanned.clear()
    sizes = load_index(str(copy / "000002.tar.fastmoco-index")).sizes
    limit = int(sizes.prod(axis=1).max()) - 1  # then some are too large
    source = shards.open_shards(str(copy), limit)
    assert "000002.tar" in scanned
    assert source.bad


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("module", ["fastmoco", "fastmoco.data.pack"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_an_interrupted_pack(tmp_path: Path, how: int, module: str) -> None:
    """It works in processes here; what one that was killed cannot delete, the next one does."""
    images, out = tmp_path / "images", tmp_path / "pack"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(noise).save(images / "0.jpg")
    for number in range(1, 1000):
        os.link(images / "0.jpg", images / f"{number}.jpg")
    verb = ["pack"] if module == "fastmoco" else []
    process = begun("-m", module, *verb, f"--data.root={images}", f"--out={out}")
    try:
        while not any(path.stat().st_size for path in out.glob(".000000.tar.*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        assert all_ended(process.pid, 60)
        _, errors = process.communicate()
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
    if how == signal.SIGKILL:
        assert len(list(out.glob(".000000.tar.*"))) == 1
        for path in list(images.iterdir())[5:]:
            path.unlink()
        (out / "pack.json").unlink()  # it may be killed before that is written, too
        assert pack.main([f"--data.root={images}", f"--out={out}", "--short-side=32"]) == 0
        names = ["000000.jsonl", "000000.tar", "000000.tar.fastmoco-index", "pack.json"]
        assert sorted(os.listdir(out)) == names
    else:
        assert (process.returncode, errors) == (130, "fastmoco: interrupted\n")
        assert os.listdir(out) == ["pack.json"]


def test_one_process_packs_into_a_folder(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    out.mkdir()
    with Owner(out):
        assert run(images, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out} belongs to process {os.getpid()}" in line
    assert "choose another --out" in line
    assert run(images, out) == 0


def test_what_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pack"
    assert run(images, out) == 0
    assert run(images, out, "--quality", "80") == 2
    assert "quality 90 there, 80 here" in capsys.readouterr().err
    assert run(images, images) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(images, out, "--quality", "96")
    assert ended.value.code == 2
    only_bad = tmp_path / "only_bad"
    only_bad.mkdir()
    shutil.copy(images / "dog" / "bad.jpg", only_bad / "bad.jpg")
    assert run(only_bad, tmp_path / "none") == 2
    assert "none can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, None],
    ids=["empty", "cut", "a list", "no text", "deep", "a folder"],
)
def test_a_damaged_note_of_a_pack_is_a_sentence(
    content: bytes | None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "pack" / pack.NOTE
    note.parent.mkdir()
    if content is None:
        note.mkdir()
    else:
        note.write_bytes(content)
    assert run(images, note.parent) == 2
    assert f"{note} is damaged" in capsys.readouterr().err
    assert list(note.parent.iterdir()) == [note]


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_of_a_table_keep_their_labels(tmp_path: Path, labelled: bool) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    names = ["cat", "dog", "dog", "cat", "owl"]
    columns = {"image": [encoded("RGB", (40 + n, 40)) for n in range(5)]}
    table = pa.table({**columns, "label": names} if labelled else columns)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    out = tmp_path / "pack"
    assert run(tmp_path / "a.parquet", out, "--data.source", "parquet") == 0
    found = {line["source"]: line.get("label") for line in lines(out)}
    assert found == {f"a.parquet:row {n}": names[n] if labelled else None for n in range(5)}
