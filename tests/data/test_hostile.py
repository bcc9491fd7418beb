"""Hostile files: none stops the loader, each is reported, all other rows stay what they were."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.folder import FolderSource

CPU = torch.device("cpu")
GOOD = 40
BATCH = 16
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


def jpeg(**options: object) -> bytes:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((80, 60))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(buffer, "PNG", **options)
    return buffer.getvalue()


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def png_of_size(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(100))
    chunks = b""
    for chunk in (head, body, b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + chunks


def thumbnail_only() -> bytes:
    """Cut in the main scan, but a complete thumbnail in EXIF has its own end marker."""
    data = jpeg(quality=95)
    thumbnail = jpeg(quality=30)
    segment = b"Exif\0\0" + thumbnail
    block = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return data[:2] + block + data[2 : len(data) // 2]


def hostile_files() -> dict[str, bytes]:
    good, picture = jpeg(), png()
    progressive = jpeg(progressive=True)
    scan = good.index(b"\xff\xda")
    tables, frame = good.index(b"\xff\xdb"), good.index(b"\xff\xc0")
    return {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "only_start.jpg": good[:2],
        "start_and_end.jpg": good[:2] + b"\xff\xd9",
        "no_frame.jpg": good[:20],
        "header_only.jpg": good[: scan + 4],
        "half.jpg": good[: len(good) // 2],
        "nine_tenths.jpg": good[: len(good) * 9 // 10],
        "half_progressive.jpg": progressive[: len(progressive) // 2],
        "cut_after_thumbnail.jpg": thumbnail_only(),
        # Complete and plain by its markers: only a decoder notices.
        "no_tables.jpg": good[:tables] + good[frame:],
        "zeros.jpg": bytes(5000),
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "text.jpg": b"this is not an image at all, sorry\n" * 40,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "document.jpg": b"%PDF-1.7\n" + bytes(300),
        "archive.jpg": b"PK\x03\x04" + bytes(300),
        "zero_width.jpg": with_size(good, 0, 60),
        "zero_height.jpg": with_size(good, 80, 0),
        "bomb.jpg": with_size(good, 65500, 65500),
        "bomb.png": png_of_size(60_000, 60_000),
        "short.png": png_of_size(500, 500),
        "half.png": picture[: len(picture) // 2],
        "bad_sum.png": picture[:60] + bytes([picture[60] ^ 255]) + picture[61:],
        "signature.png": picture[:8],
        "half.webp": webp()[: len(webp()) // 2],
        "half.gif": b"GIF89a" + struct.pack("<HH", 50, 50) + b"\0\0\0",
        "header.bmp": b"BM" + bytes(60),
        "huge_claim.ppm": b"P6\n9999 9999\n255\n" + bytes(100),
        "no_data.tif": b"II*\0\x08\0\0\0" + bytes(8),
    }


def webp() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(buffer, "WEBP")
    return buffer.getvalue()


def build_corpus(root: Path, hostile: bool) -> set[str]:
    """Good images with the hostile ones between; without, good images stand in their place."""
    root.mkdir()
    rng = np.random.default_rng(3)
    for number in range(GOOD):
        width, height = (int(x) for x in rng.integers(40, 90, 2))
        noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        image = noise.resize((width, height))
        image.save(root / f"{number:03d}.jpg", quality=92)
    for name, data in hostile_files().items():
        (root / name).write_bytes(data if hostile else jpeg())
    if hostile:
        os.symlink(root / "nowhere", root / "dangling.jpg")
    else:
        (root / "dangling.jpg").write_bytes(jpeg())
    return {*hostile_files(), "dangling.jpg"}


def configuration(root: Path, tmp_path: Path, backend: str, share: float = 0.6) -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / f"run_{root.name}_{backend}"), seed=5),
        data=DataConfig(
            root=str(root),
            backend=backend,  # type: ignore[arg-type]
            workers=1,
            threads=1,
            max_bad_share=share,
        ),
        augment=AugmentConfig(image_size=32),
        optim=OptimConfig(global_batch_size=BATCH),
    )


Batches = tuple[list[torch.Tensor], np.ndarray, dict[str, str]]


def run(config: Config, steps: int, between: Callable[[int], None] = lambda _: None) -> Batches:
    """Views of every row, the samples asked for, and what was reported, by file name."""
    views, asked = [], []
    with build_loader(config, device=CPU) as loader:
        for step, batch in enumerate(loader.batches(0, steps)):
            views += [torch.cat([batch.im_q, batch.im_k], dim=2)]
            asked.append(loader.plan.queries(step).samples)
            between(step)
    path = Path(config.run.dir) / "bad_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return views, np.concatenate(asked), {Path(row["name"]).name: row["reason"] for row in rows}


@pytest.mark.parametrize("backend", ["array", "pil", pytest.param("dali", marks=needs_dali)])
def test_hostile_files_are_replaced_reported_and_harmless(tmp_path: Path, backend: str) -> None:
    assert len(hostile_files()) >= 25
    expected = build_corpus(tmp_path / "bad", hostile=True)
    build_corpus(tmp_path / "good", hostile=False)
    names = sorted(path.name for path in (tmp_path / "good").iterdir())
    steps = len(names) // BATCH + 2  # into the second epoch
    with_bad, asked, reported = run(configuration(tmp_path / "bad", tmp_path, backend), steps)
    without, same, _ = run(configuration(tmp_path / "good", tmp_path, backend), steps)
    assert np.array_equal(asked, same)
    survivors = np.array([names[sample] not in expected for sample in asked])
    assert survivors.sum() > 0
    for a, b in zip(torch.cat(with_bad)[survivors], torch.cat(without)[survivors], strict=True):
        assert torch.equal(a, b)
    replaced = torch.cat(with_bad)[~survivors]
    assert len(replaced) > 15
    assert replaced.float().std(dim=(1, 2, 3)).min() > 0  # real images, not empty memory
    drawn = {names[sample] for sample in asked} & expected
    assert drawn <= set(reported) <= expected
    assert all(reported[name] for name in drawn)
    again, _, _ = run(configuration(tmp_path / "bad", tmp_path / "again", backend), steps)
    assert all(torch.equal(a, b) for a, b in zip(with_bad, again, strict=True))


def test_backends_agree_on_what_is_bad(tmp_path: Path) -> None:
    build_corpus(tmp_path / "bad", hostile=True)
    backends = ["array", "dali"] if has_dali() else ["array", "pil"]
    reports = [
        run(configuration(tmp_path / "bad", tmp_path, backend), 5)[2] for backend in backends
    ]
    assert set(reports[0]) == set(reports[1])
    assert "empty" in reports[0]["empty.jpg"]
    assert "pixels exceed" in reports[0]["bomb.jpg"]
    assert "FileNotFoundError" in reports[0]["dangling.jpg"]


@pytest.mark.parametrize("backend", ["array", pytest.param("dali", marks=needs_dali)])
def test_files_that_vanish_or_rot_during_training(tmp_path: Path, backend: str) -> None:
    build_corpus(tmp_path / "some", hostile=False)
    files = sorted((tmp_path / "some").iterdir())
    config = configuration(tmp_path / "some", tmp_path, backend)
    before, _, _ = run(config, 8)
    gone, cut, grown = files[3], files[11], files[17]

    def change(step: int) -> None:
        if step == 0:
            gone.unlink()
            cut.write_bytes(cut.read_bytes()[:400])
            grown.write_bytes(jpeg() + b"more")

    views, asked, reported = run(config, 8, change)
    # What was on its way is unchanged; from step 6 on nothing was prefetched before the change.
    late = [k for k, sample in enumerate(asked) if k >= 6 * BATCH and sample not in (3, 11, 17)]
    assert torch.equal(torch.cat(views)[late], torch.cat(before)[late])
    assert set(reported) <= {gone.name, cut.name}
    assert {3, 11} & set(asked[6 * BATCH :].tolist()) <= {
        files.index(path) for path in (gone, cut) if path.name in reported
    }


def test_a_file_without_permission_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is simulated, since root may read everything; workers are forked with it."""
    build_corpus(tmp_path / "some", hostile=False)
    config = configuration(tmp_path / "some", tmp_path, "array")
    before, asked, _ = run(config, 4)
    read = FolderSource.read

    def refusing(source: FolderSource, sample: int) -> bytes:
        if sample == 7:
            raise PermissionError(13, "Permission denied")
        return read(source, sample)

    monkeypatch.setattr(FolderSource, "read", refusing)
    views, _, reported = run(config, 4)
    others = asked != 7
    assert not others.all()
    assert torch.equal(torch.cat(views)[others], torch.cat(before)[others])
    assert not torch.equal(torch.cat(views)[~others], torch.cat(before)[~others])
    assert list(reported.values()) == ["PermissionError: Permission denied"]


def test_too_many_bad_files_stop_the_run_with_one_sentence(tmp_path: Path) -> None:
    build_corpus(tmp_path / "bad", hostile=True)
    with pytest.raises(ConfigError, match=r"max_bad_share 0\.01") as caught:
        run(configuration(tmp_path / "bad", tmp_path, "array", share=0.01), 3)
    assert "bad_samples.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_dali
def test_only_culprits_cost_the_search_a_pipeline() -> None:
    from fastmoco.data.backends import dali_graph

    data = [jpeg(quality=50 + number) for number in range(32)]
    for culprit in (0, 13):
        data[culprit] = data[culprit][:400] + b"\xff\xc4\x00\x01 a broken table"
    with mock.patch.object(dali_graph, "decoder_of_one", wraps=dali_graph.decoder_of_one) as built:
        assert dali_graph.refused_by_decoder(data, None) == [0, 13]
    assert built.call_count == 3


@needs_dali
@pytest.mark.parametrize("kind", ["OutOfMemoryError", "AcceleratorError"])
def test_a_fault_of_the_device_is_no_fault_of_an_image(kind: str) -> None:
    from fastmoco.data.backends import dali, dali_graph

    error: type[Exception] = getattr(torch, kind)
    engine = dali.DaliEngine(Config(), mock.Mock(), mock.Mock(), CPU)
    with (
        mock.patch.object(engine, "_run", side_effect=error),
        mock.patch.object(dali, "read_work", side_effect=AssertionError("searches for images")),
        pytest.raises(error),
    ):
        engine.next()
    fails = mock.Mock(side_effect=error)
    with (
        mock.patch.object(dali_graph, "decoder_of_one", return_value=mock.Mock(run=fails)),
        pytest.raises(error),
    ):
        dali_graph.refused_by_decoder([jpeg()], None)
