"""The doctor's findings, and the preflight that training runs at its start."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, parse
from fastmoco.data.backends import choose
from fastmoco.doctor import __main__ as doctor
from fastmoco.doctor import findings, speed
from fastmoco.machine.ranks import World
from fastmoco.method import build
from fastmoco_kernels import launch, preflight
from tests.support.ranks import Ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
]


def test_doctor_of_a_synthetic_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", 0.1)
    assert doctor.main([*TINY, "--run.device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in ("versions", "cpu", "precision", "shuffle", "preflight", "exchange", "step"):
        assert f"\n{name}" in f"\n{printed}"
    assert "every op equals its float64 reference" in printed


@pytest.mark.parametrize("mechanism", ["queue", "end_to_end", "memory_bank"])
def test_doctor_of_every_mechanism_writes_nothing_into_the_run(
    mechanism: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of bad images, whether indexing finds them or decoding."""
    monkeypatch.setattr(speed, "BUDGET_S", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(24):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number:02d}.png")
    for number, size in ((3, 0), (4, 2000)):
        path = tmp_path / "images" / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[:size])
    few = ["--moco.queue_size", "8", "--knn.every", "0", "--run.dir", "run", "--run.device", "cpu"]
    few += ["--model.width", "0.125", "--moco.mechanism", mechanism, "--data.workers", "1"]
    few += ["--optim.name", "sgd"] * (mechanism != "queue")
    few += ["--data.source", "folder", "--data.root", "images"]
    assert doctor.main([*TINY, *few, "--data.max_bad_share", "0.2"]) == 0
    told = capsys.readouterr().out
    assert "2 of 24 bad" in told
    assert "verdict" in told
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert doctor.main([*TINY, *few]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 24 samples are bad, more than data.max_bad_share 0.01" in line
    assert line.endswith("/images/03.png.")


def test_doctor_refuses_what_training_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([*TINY, "--moco.bn_group_size", "3"]) == 2
    assert "bn_group_size" in capsys.readouterr().err


def test_preflight_is_silent_when_all_is_well() -> None:
    assert preflight.short_preflight(CPU) == []
    assert launch.replaced() == {}


def test_wrong_kernel_is_replaced_loudly_on_cuda() -> None:
    wrong = [
        preflight.Result("info_nce", "bfloat16", False, "WRONG loss", 0.1),
        preflight.Result("info_nce", "float16", False, "WRONG loss", 0.1),
        preflight.Result("ema_", "float32", True, "", 0.1),
    ]
    with (
        mock.patch.object(preflight, "check", return_value=wrong),
        pytest.warns(RuntimeWarning, match="switched off"),
    ):
        (sentence,) = preflight.short_preflight(torch.device("cuda"))
    assert launch.replaced() == {"info_nce": "bfloat16: WRONG loss"}
    launch.use_kernel("info_nce")
    assert sentence.startswith("info_nce is wrong on cuda")
    with mock.patch.object(preflight, "check", return_value=wrong), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(preflight.short_preflight(CPU)) == 1
    assert launch.replaced() == {}


def exchange(world: World) -> str:
    return findings.check_exchange(world)[1]


def test_exchange_between_two_ranks(two_ranks: Ranks) -> None:
    for verdict in two_ranks.run(exchange):
        assert verdict.startswith("every row came home")


def test_lost_row_is_found() -> None:
    with mock.patch.object(findings, "_identity", lambda images: images.flip(0)):
        _, verdict = findings.check_exchange(World(0, 0, 1, CPU, "none"))
    assert verdict.startswith("WRONG")


@pytest.mark.parametrize(
    ("side", "batch", "group", "expected"),
    [
        (32, 128, 16, (64, 16)),
        (96, 256, 32, (64, 32)),
        (224, 256, 32, (8, 8)),
        (224, 256, 3, (8, 8)),  # 3 does not divide 8
        (224, 256, 0, (8, 8)),
        (224, 4, 2, (4, 2)),  # as small as it is
    ],
)
def test_speed_is_measured_with_a_batch_that_a_cpu_can_step_through(
    side: int, batch: int, group: int, expected: tuple[int, int]
) -> None:
    sizes = ["--augment.image_size", str(side), "--optim.global_batch_size", str(batch)]
    small = speed._small_batch(parse([*sizes, "--moco.bn_group_size", str(group)]))
    assert (small.optim.global_batch_size, small.moco.bn_group_size) == expected


def test_verdict_names_what_limits() -> None:
    cuda = torch.device("cuda")
    assert "device limits" in speed._verdict(2000.0, 1000.0, cuda, compiled=False)
    # An H200 stepped 2.5 times as fast once compiled: then its loader was the slower one.
    uncertain = speed._verdict(2000.0, 1000.0, cuda, compiled=True)
    assert "limits" not in uncertain
    assert "data_wait_percent" in uncertain
    for compiled in (False, True):
        assert "idle 50 %" in speed._verdict(500.0, 1000.0, cuda, compiled)
        assert "share the cores" in speed._verdict(500.0, 1000.0, CPU, compiled)


def test_torch_compile_on_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, config = torch.device("cuda"), Config()
    on = replace(config, run=replace(config.run, compile="on"))
    assert build.compile_encoders(config, cuda)
    assert not build.compile_encoders(config, CPU)
    monkeypatch.setattr(build, "HAS_TRITON", False)
    assert not build.compile_encoders(config, cuda)
    assert build.compile_encoders(on, CPU)
    with pytest.raises(ConfigError, match=r"set run\.compile to off"):
        build.compile_encoders(on, cuda)


def test_cuda_without_triton_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "HAS_TRITON", False)
    with mock.patch.object(preflight, "check", return_value=[]):
        assert preflight.short_preflight(torch.device("cuda")) == [launch.NO_TRITON]
        assert preflight.short_preflight(CPU) == []


@pytest.mark.parametrize("why", ["", "torchvision cannot decode on this GPU (x)"])
def test_what_decodes_on_a_gpu_is_told(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choose, findings):
        monkeypatch.setattr(module, "has_dali", lambda: False)
        monkeypatch.setattr(module, "why_no_nvjpeg", lambda device: why)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lines = list(findings.loader_choices(Config(), CUDA))
    assert lines[0][1].endswith(f"nvJPEG: {why or 'decodes here'}; data.backend auto")
    assert [text for _, text in lines[1:]] == ([choose.missing_dali(Config(), CUDA)] if why else [])
    assert not why or why in lines[1][1]
    lines = list(findings.loader_choices(Config(), CPU))
    assert lines == [("loader", "DALI not installed; data.backend auto")]


def test_the_views_of_nvjpeg_are_compared_with_pils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU's decoder in its place, and with one that is wrong."""
    from fastmoco.data.backends.nvjpeg import decoder

    monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: "")
    for number in range(4):
        smooth = Image.radial_gradient("L").resize((60 + number, 50)).convert("RGB")
        smooth.save(tmp_path / f"{number}.jpg")
    config = Config(
        data=DataConfig(root=str(tmp_path), backend="nvjpeg"), augment=AugmentConfig(image_size=32)
    )
    assert "nvjpeg agrees with PIL: 0.0" in findings.check_views(config, CPU)[1]
    right = decoder.decode_all
    monkeypatch.setattr(
        decoder,
        "decode_all",
        lambda data, device: [one // 2 for one in right(data, device)],
    )
    assert "nvjpeg DIFFERS FROM PIL" in findings.check_views(config, CPU)[1]
