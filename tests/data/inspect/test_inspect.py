"""`fastmoco inspect`: odd files, recommended lines that train, copies, the page, bad input."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco import cli
from fastmoco.config import Config, check, parse, warnings
from fastmoco.data.inspect import __main__ as inspect
from fastmoco.data.inspect.advice import advise, pack_side, view_side
from fastmoco.data.inspect.contents import Contents, contents_of, kind_of_reason
from fastmoco.data.inspect.findings import Findings
from fastmoco.data.inspect.rate import rate
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine import durable
from tests.support.data.hostile import GOOD, build_corpus, hostile_files, jpeg
from tests.support.data.images import npy, png

SIDE = 36
COUNT = 80  # of which a batch has four BN groups of two
TINY = ["--model.arch", "resnet18", "--model.width", "0.125", "--run.max_steps", "2"]


@pytest.fixture(autouse=True)
def _loader_is_measured_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastmoco.data.inspect.rate.rate",
        lambda once, images, device: rate(once, images, device, budget_s=0.01),
    )


def values(seed: int, channels: int) -> np.ndarray:
    """(channels, 36, 36) uint16 of slopes and noise between 1,000 and 5,000."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    slopes = rng.uniform(0, 1000, (channels, 2, 1, 1)) * np.stack([y, x])
    noise = rng.uniform(0, 2000, (channels, SIDE, SIDE))
    return np.asarray(1000 + slopes.sum(axis=1) + noise, np.uint16)


def rgb(seed: int) -> bytes:
    return png((values(seed, 3) / 20).astype(np.uint8).transpose(1, 2, 0))


SETS: dict[str, tuple[str, int, Callable[[int], bytes]]] = {
    "rgb": (".png", 3, rgb),
    "x-ray": (".png", 1, lambda seed: png(values(seed, 1)[0])),
    "satellite": (".npy", 13, lambda seed: npy(values(seed, 13))),
}


def make(root: Path, kind: str, count: int = 40) -> Path:
    suffix, _, encode = SETS[kind]
    (root / "a").mkdir(parents=True)
    for number in range(count):
        (root / "a" / f"{number:03d}{suffix}").write_bytes(encode(number))
    return root


def looked(root: Path, *options: str, samples: int = 0) -> Findings:
    return inspect.inspect(resolve_folders(parse(["--data.root", str(root), *options])), samples)


@pytest.mark.parametrize("kind", SETS)
def test_printed_lines_start_a_run_unchanged(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "a: folder #1", kind, COUNT)
    assert cli.main(["inspect", str(root)]) == 0
    printed = capsys.readouterr().out
    yaml, rest = printed.split("for --config:\n\n")[1].split("\n\nThe same as options:\n\n")
    command = shlex.split(rest.split("\n\n")[0].replace("\\\n", ""))
    (tmp_path / "recipe.yaml").write_text(yaml)
    config = parse(["--config", str(tmp_path / "recipe.yaml")])
    assert config == parse(command[2:])
    assert config.data.channels == SETS[kind][1]
    assert warnings(config, 1, COUNT) == []
    if kind == "rgb":
        assert config.data.mean == config.data.std == "default"
    else:
        assert isinstance(config.data.intensity, tuple)
        assert 1000 <= config.data.intensity[0] < config.data.intensity[1] <= 5000
        assert len(config.data.mean) == SETS[kind][1]
    runs = [["--config", str(tmp_path / "recipe.yaml")], command[2:]]
    for number, lines in enumerate(runs if kind == "x-ray" else runs[:1]):
        run = ["--run.dir", str(tmp_path / f"run{number}"), "--data.workers", "1"]
        assert cli.main([*command[1:2], *lines, *TINY, *run]) == 0
        assert (tmp_path / f"run{number}" / "metrics.jsonl").exists()


def test_odd_files_are_each_counted_once_and_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "odd"
    build_corpus(root, hostile=True)
    os.mkfifo(root / "pipe.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    with open(root / "sparse.jpg", "wb") as file:
        file.truncate(1 << 30)
    (root / "back").symlink_to(root)
    (root / "notes.txt").write_text("text")
    odd = len(hostile_files()) + 3  # the dangling link, the circle and the sparse file
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(root), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"  {GOOD + odd} pictures" in printed
    table = printed.split("Cannot be used\n")[1].split("\n\n")[0].splitlines()[1:-1]
    counts = [int(line.split()[0]) for line in table]
    assert sum(counts) == odd
    assert counts == sorted(counts, reverse=True)
    assert f"JPEG ({GOOD})" in printed
    assert "1 names are no regular files" in printed
    assert "not counted as images: 1 .txt" in printed
    assert "sparse.jpg" in printed
    assert "bomb.jpg" in page.read_text()
    share = float(re.findall(r"max_bad_share: ([\d.]+)", printed)[0])
    assert odd / (GOOD + odd) < share < 0.7


def test_a_set_without_a_picture_that_decodes_has_reasons_and_no_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg()[: 600 + number])
    assert cli.main(["inspect", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "None of 4 sampled pictures can be used" in printed
    assert "fastmoco train" not in printed
    assert "4 more do not decode" in printed


def test_reasons_that_differ_in_numbers_and_bytes_are_one() -> None:
    same = "OSError: image file is truncated (N bytes not processed)"
    for count in (0, 12, 345):
        assert kind_of_reason(same.replace("N", str(count))) == same
    starts = {kind_of_reason(f"not an image: starts with {b!r}") for b in (b"a'b", b'"', b"\0x")}
    assert len(starts) == 1


def test_copies_are_found_in_training_and_between_it_and_the_test_set(tmp_path: Path) -> None:
    train, test = tmp_path / "train" / "a", tmp_path / "test" / "a"
    make(tmp_path / "train", "rgb", 20)
    test.mkdir(parents=True)
    shutil.copy(train / "004.png", train / "same.png")
    with Image.open(train / "005.png") as image:
        image.resize((72, 72), Image.Resampling.BICUBIC).save(train / "large.png")
        image.save(test / "again.bmp")
    shutil.copy(train / "007.png", test / "same.png")
    (test / "new.png").write_bytes(rgb(1000))
    found = looked(tmp_path)
    within, names = found.duplicates.within, found.name_at
    assert [[names(at) for at in group] for group in within.exact] == [
        ["train/a/004.png", "train/a/same.png"]
    ]
    assert [[names(at) for at in group] for group in within.near] == [
        ["train/a/005.png", "train/a/large.png"]
    ]
    exact, near = (
        [(names(a), names(b)) for a, b in pairs]
        for pairs in (found.duplicates.exact, found.duplicates.near)
    )
    assert exact == [("train/a/007.png", "test/a/same.png")]
    assert near == [("train/a/005.png", "test/a/again.bmp")]


def test_a_sample_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "set", "rgb")
    (root / "a" / "000.png").write_bytes(b"")
    assert cli.main(["inspect", "--samples=20", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "all else is of 20 pictures" in printed
    assert "PNG (19)" in printed
    assert "1 of 40 headers" in printed
    assert "about one pair in 4 was seen" in printed


def contents(sizes: list[tuple[int, int]]) -> Contents:
    return Contents(len(sizes), np.array(sizes, np.int32), [], 0, [])


@pytest.mark.parametrize(
    ("shorter", "side"),
    [([500, 375, 300, 400], 224), ([96] * 4, 96), ([28] * 4, 28), ([4] * 4, 8), ([63] * 4, 32)],
)
def test_views_are_no_larger_than_three_in_four_pictures(shorter: list[int], side: int) -> None:
    assert view_side(np.array(shorter, np.int32)) == side
    assert pack_side(224) == 400


@pytest.mark.parametrize(
    ("total", "keys", "batch"),
    [(1_281_167, 65_536, 256), (50_000, 4096, 256), (2048, 256, 256), (500, 32, 32), (3, 2, 2)],
)
def test_keys_are_an_eighth_of_the_pictures(
    total: int, keys: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmoco.data.inspect.advice._notes", lambda *_: [])
    some = Contents(total, np.full((total, 2), 64, np.int32), [], 0, [])
    config, _ = advise(Config(), some, source=None)  # type: ignore[arg-type]
    assert config.moco.queue_size == keys
    assert config.optim.global_batch_size == batch
    check(config, 1)
    if total > 100:
        assert warnings(config, 1, total) == []


def test_small_pictures_among_large_ones_ask_for_larger_crops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastmoco.data.inspect.advice._notes", lambda *_: [])
    some = contents([(80, 100)] * 10 + [(400, 300)] * 90)
    config, _ = advise(Config(), some, source=None)  # type: ignore[arg-type]
    # A view of 224 from a crop of 56 pixels: sqrt(0.49) x 80.
    assert (config.augment.image_size, config.augment.min_area) == (224, 0.49)


def test_bad_shares_of_headers_and_of_the_sample_add_up(tmp_path: Path) -> None:
    root = make(tmp_path / "set", "rgb", 20)
    for number in (0, 1):
        (root / "a" / f"{number:03d}.png").write_bytes(b"")
    for number in (10, 11, 12):
        path = root / "a" / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:1500])
    found = looked(root).contents
    assert (found.unreadable, found.undecoded) == (2, 3)
    assert found.bad_share == pytest.approx(5 / 20)
    half = contents_of(looked(root).source, found.looks[::2])  # 0 and 10, 12 of ten
    assert half.bad_share == pytest.approx(2 / 20 + 18 / 20 * 2 / 9)


class Tags(HTMLParser):
    """Whether every tag is closed, and what is fetched."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.VOID else [tag]
        self.images += tag == "img"
        links = [value or "" for name, value in attrs if name in ("src", "href")]
        self.fetched += [link for link in links if not link.startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    root = make(tmp_path / "x <rays>", "x-ray", 24)
    (root / "a" / "003.png").rename(root / "a" / os.fsdecode(b"\xff<b>.png"))
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(root), "--html", str(page)]) == 0
    tags = Tags()
    tags.feed(page.read_text())
    assert (tags.open, tags.fetched, tags.images) == ([], [], 24)
    assert "<b>" not in page.read_text()


def test_bands_of_any_brightness_are_seen_on_the_contact_sheet(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(4):
        bands = values(number, 13)
        bands[:12] //= 50  # the first three, which are shown, would be black
        (tmp_path / "set" / f"{number}.npy").write_bytes(npy(bands))
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(tmp_path / "set"), "--html", str(page)]) == 0
    for data in re.findall(r"data:image/jpeg;base64,([\w+/=]+)", page.read_text()):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
        assert shown.std(axis=(0, 1)).min() > 40


@pytest.mark.parametrize("source", ["list", "shards"])
def test_other_sources(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "set", "rgb", 8)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    if source == "list":
        root = tmp_path / "images.txt"
        root.write_text("\n".join(map(str, names)))
    else:
        root = tmp_path / "images.tar"
        with tarfile.open(root, "w") as tar:
            for name in names:
                tar.add(tmp_path / name, name)
    assert cli.main(["inspect", "--data.source", source, str(root)]) == 0
    printed = capsys.readouterr().out
    assert "PNG (8)" in printed
    assert f"--data.source {source}" in printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "name the folder"),
        (["nowhere"], "nowhere is not a folder"),
        (["a", "b"], "a and b"),
        (["a", "--data.root", "b"], "both a and --data.root"),
        (["a", "--samples", "-1"], "at least 0"),
        (["a", "--samples", "many"], "many"),
        (["a", "--data.chanels", "4"], "chanels"),
        (["a", "--data.max_pixels", "0"], "data.max_pixels"),
        (["--data.source", "synthetic"], "no files"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["inspect", *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmoco: ")
    assert part in line


@pytest.mark.parametrize("place", ["no/page.html", "set"])
def test_a_page_that_cannot_be_written_is_one_sentence_before_anything_is_looked_at(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    root = make(tmp_path / "set", "rgb", 8)
    monkeypatch.setattr(inspect, "inspect", lambda *_: pytest.fail("it was looked at"))
    assert inspect.main([str(root), "--html", str(tmp_path / place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastmoco: Cannot write the page {tmp_path / place}: ")


def test_what_was_found_is_said_even_if_the_page_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    root = make(tmp_path / "set", "rgb", 8)
    monkeypatch.setattr(durable, "replace", full)
    assert inspect.main([str(root), "--html", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr()
    assert "8 pictures" in told.out
    assert "No space left" in told.err.splitlines()[-1]
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("odd", [b"", b"no image", "cut", "long"])
def test_the_size_of_all_is_that_of_the_files_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: bytes | str
) -> None:
    """Neither a file that is no picture changes it, nor does a long one raise that of others."""
    root = make(tmp_path / "set", "rgb", 8)
    files = sorted((root / "a").iterdir())
    if isinstance(odd, bytes):
        files[0].write_bytes(odd)
        size = sum(path.stat().st_size for path in files[1:])
    else:  # its header can be read
        whole = files[0].read_bytes()
        files[0].write_bytes(whole[: len(whole) // 2] + bytes(100_000) * (odd == "long"))
        size = sum(path.stat().st_size for path in files)
    assert inspect.main([str(root)]) == 0
    unit, name = (1000, "kB") if size >= 1000 else (1, "bytes")
    assert f"8 pictures, about {size / unit:.3g} {name} in all" in capsys.readouterr().out
