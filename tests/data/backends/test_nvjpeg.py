"""The nvJPEG backend with torchvision's decoder of the CPU: choice, refusals, thread, repairs.

That its batches are the oracle's stands in test_loader.py, what it makes of hostile files in
test_hostile.py, what its decoder refuses in test_nvjpeg_decoder.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends import choose
from fastmoco.data.backends.nvjpeg import decoder, engine, reader
from fastmoco.data.backends.nvjpeg.engine import NvjpegEngine
from fastmoco.data.loader import Loader, build_loader
from tests.data.conftest import photograph
from tests.support.data.refusing import Refusing, bytes_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
decode_all = decoder.decode_all


def configuration(root: Path, tmp_path: Path, backend: str = "nvjpeg") -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), seed=3, timeout_s=60),
        data=DataConfig(root=str(root), backend=backend, workers=1),  # type: ignore[arg-type]
        augment=AugmentConfig(image_size=32),
        optim=OptimConfig(global_batch_size=16),
    )


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures, of which three are PNG and one is a gray JPEG."""
    monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: "")
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(24):
        image = photograph(number, 50 + 3 * number, 90 - number)
        image = image.convert("L") if number == 4 else image
        image.save(root / f"{number:02d}.{'png' if number % 9 == 0 else 'jpg'}", quality=90)
    return root


def batches(loader: Loader, steps: int) -> list[Tensor]:
    return [torch.cat([batch.im_q, batch.im_k]) for batch in loader.batches(0, steps)]


def drawn(config: Config, steps: int) -> list[Tensor]:
    with build_loader(config, device=CPU) as loader:
        return batches(loader, steps)


@pytest.mark.parametrize(
    ("dali", "reason", "chosen"),
    [(True, "", "dali"), (True, "broken", "dali"), (False, "", "nvjpeg"), (False, "x", "array")],
)
def test_auto_takes_dali_then_nvjpeg_then_array(
    dali: bool, reason: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "has_dali", lambda: dali)
    monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: reason)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert choose.choose_backend(Config(), CUDA) == chosen
    assert choose.choose_backend(Config(), CPU) == "array"
    told = choose.missing_dali(Config(), CUDA)
    assert bool(told) == (chosen == "array")
    assert not told or "and x, so the CPU does" in told


def test_without_a_gpu_it_is_refused_in_one_sentence(tmp_path: Path) -> None:
    photograph(0, 40, 40).save(tmp_path / "0.jpg")
    config = configuration(tmp_path, tmp_path)
    config = replace(config, optim=replace(config.optim, global_batch_size=1))
    with pytest.raises(ConfigError) as caught:
        build_loader(config, device=CPU)
    sentence = "data.backend is nvjpeg, but there is no NVIDIA GPU to decode on: set data.backend"
    assert str(caught.value) == f"{sentence} to array."
    deep = replace(config.data, channels=4)
    with pytest.raises(ConfigError, match="nvjpeg, which makes views of 8-bit RGB only"):
        choose.choose_backend(replace(config, data=deep), CUDA)


def test_only_jpegs_go_to_the_decoder_and_parts_of_a_batch_make_the_same_views(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(pictures, tmp_path)
    spy = mock.Mock(wraps=decoder.decode_or_refuse)
    monkeypatch.setattr(engine, "decode_or_refuse", spy)
    whole = drawn(config, 3)
    lists = [call.args[0] for call in spy.call_args_list]
    assert all(bytes_of(one[:2]) == b"\xff\xd8" for data in lists for one in data)
    assert {len(data) for data in lists} <= {13, 14, 15, 16}
    assert min(map(len, lists)) < 16  # a PNG was among them
    spy.reset_mock()
    monkeypatch.setattr(engine, "PIXELS_AT_ONCE", 20_000)
    parts = drawn(config, 3)
    assert spy.call_count > 6
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_sizes_that_exceed_what_is_decoded_at_once_come_alone() -> None:
    with mock.patch.object(engine, "PIXELS_AT_ONCE", 100):
        found = list(engine._parts([(9, 9), (1, 19), (1, 1), (20, 20), (2, 2)]))
    assert [(part.start, part.stop) for part in found] == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_a_picture_that_only_the_gpu_refuses_is_pils_and_stays(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(configuration(pictures, tmp_path), 4)
    fake = Refusing([(pictures / "05.jpg").read_bytes(), (pictures / "11.jpg").read_bytes()])
    monkeypatch.setattr(decoder, "decode_all", fake)
    with build_loader(configuration(pictures, tmp_path), device=CPU) as loader:
        found = batches(loader, 4)
        assert loader._reader is not None
        assert loader._reader.by_pil == {5, 11}
        assert not loader._reader.bad
        after = fake.calls
        list(loader.batches(4, 8))
        assert fake.calls <= after + 4 + 2  # at most two that were on their way, never again
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


def test_a_picture_of_another_size_than_its_header_says_is_not_cropped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(configuration(pictures, tmp_path), 2)

    def smaller(data: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        return [one[:, 1:] for one in decode_all(data, device)]

    monkeypatch.setattr(decoder, "decode_all", smaller)
    found = drawn(configuration(pictures, tmp_path), 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


def test_a_bad_picture_is_replaced_as_by_the_other_backends(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (pictures / "07.jpg").read_bytes()
    tables = good.index(b"\xff\xdb")  # plain by its markers: only a decoder notices
    (pictures / "07.jpg").write_bytes(good[:tables] + good[good.index(b"\xff\xc0") :])
    config = configuration(pictures, tmp_path)
    config = replace(config, data=replace(config.data, max_bad_share=0.5))
    found = drawn(config, 4)
    by_pil = drawn(replace(config, data=replace(config.data, backend="pil")), 4)
    for a, b in zip(found, by_pil, strict=True):
        assert (a.float() - b.float()).abs().mean() < 0.1
    row = json.loads((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()[0])
    assert row["name"].endswith("07.jpg")
    with build_loader(config, device=CPU) as loader:  # resumed behind it, found again
        later = [torch.cat([batch.im_q, batch.im_k]) for batch in loader.batches(2, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found[2:], later, strict=True))


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_taken(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = mock.Mock(side_effect=torch.OutOfMemoryError("full"))
    monkeypatch.setattr(decoder, "decode_all", full)
    with (
        build_loader(configuration(pictures, tmp_path), device=CPU) as loader,
        pytest.raises(torch.OutOfMemoryError),
    ):
        next(loader.batches(0, 1))
    assert full.call_count == 1


def of(loader: Loader) -> NvjpegEngine:
    assert isinstance(loader._engine, NvjpegEngine)
    return loader._engine


def test_the_thread_works_one_batch_ahead_and_ends_with_the_loader(
    pictures: Path, tmp_path: Path
) -> None:
    before = threading.active_count()
    with build_loader(configuration(pictures, tmp_path), device=CPU) as loader:
        first = next(loader.batches(0, 1))
        mine = of(loader)
        deadline = time.monotonic() + 60
        while not mine._made.full() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mine._made.full()  # and the one behind it waits for its place
        second = next(loader.batches(1, 2))
        assert not torch.equal(first.im_q, second.im_q)
        again = next(loader.batches(0, 1))
        assert torch.equal(first.im_q, again.im_q)
    loader.close()
    assert mine._thread is None
    assert threading.active_count() <= before + 1  # torch's own, of shared memory


def test_the_decoder_finds_an_idle_stream_and_the_step_waits_for_the_views(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls on a GPU, written down by stand-ins for its streams."""
    calls: list[str] = []

    def note(name: str, result: Any = None) -> Any:
        calls.append(name)
        return result

    def decode(data: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        calls.append("decode")
        return decode_all(data, device)

    own = SimpleNamespace(
        synchronize=lambda: note("drain"), record_event=lambda: note("ready", "the event")
    )
    current = SimpleNamespace(wait_event=lambda event: note(f"wait for {event}"))
    monkeypatch.setattr(decoder, "decode_all", decode)
    monkeypatch.setattr(engine, "PIXELS_AT_ONCE", 50_000)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: note("pin", tensor))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: note("keep"))
    with build_loader(configuration(pictures, tmp_path), device=CPU) as loader:
        monkeypatch.setattr(of(loader), "_stream", own)
        next(loader.batches(0, 1))
        made = calls[: calls.index("ready") + 1]
    parts = made.count("decode")
    assert parts > 1
    assert made == ["pin", *["drain", "decode"] * parts, "ready"]
    taken = [call for call in calls if call.startswith(("wait", "keep"))]
    assert taken == ["wait for the event", "keep"]


def test_a_reader_that_dies_ends_the_wait(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(dataset: object, micro_step: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(reader.Deliveries, "__getitem__", dies)
    with (
        build_loader(configuration(pictures, tmp_path), device=CPU) as loader,
        pytest.raises(ChildProcessError, match=r"killed by signal|exited unexpectedly"),
    ):
        next(loader.batches(0, 1))


def test_a_reader_that_is_silent_ends_the_wait(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.Deliveries, "__getitem__", lambda *_: time.sleep(3600))
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.1)
    config = configuration(pictures, tmp_path)
    config = replace(config, run=replace(config.run, timeout_s=0.5))
    with (
        build_loader(config, device=CPU) as loader,
        pytest.raises(ChildProcessError, match=r"No batch came for 0\.5 seconds, in <lambda> \("),
    ):
        next(loader.batches(0, 1))


def test_cmyk_and_gray_and_progressive_files_are_the_oracles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: "")
    for number in range(16):
        image = photograph(number, 70, 60)
        mode = ("RGB", "L", "CMYK", "RGB")[number % 4]
        image.convert(mode).save(tmp_path / f"{number}.jpg", progressive=number % 4 == 3)
    Image.fromarray(np.zeros((40, 40), np.uint8)).convert("P").save(tmp_path / "palette.png")
    found = drawn(configuration(tmp_path, tmp_path), 1)[0]
    want = drawn(configuration(tmp_path, tmp_path, "pil"), 1)[0]
    assert (found.float() - want.float()).abs().mean() < 0.1


@pytest.mark.gpu
def test_batches_are_the_same_while_the_device_is_busy(pictures: Path, tmp_path: Path) -> None:
    """Nothing is written over crops or views that wait for their turn."""
    device, config = torch.device("cuda"), configuration(pictures, tmp_path)
    with build_loader(config, device=device) as loader:
        calm = [one.cpu() for one in batches(loader, 8)]
    work = torch.randn(4096, 4096, device=device)
    busy = []
    with build_loader(config, device=device) as loader:
        for batch in loader.batches(0, 8):
            for _ in range(20):
                work = (work @ work).clamp(-1, 1)
            busy.append(torch.cat([batch.im_q, batch.im_k]))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(calm, busy, strict=True))
