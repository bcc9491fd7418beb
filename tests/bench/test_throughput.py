"""A small contest in real processes: every contestant runs and its facts are right."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from bench.measure.contest import Contestant, Result, Window, contest
from bench.measure.program import Options, options, parser
from bench.steps.contestants import official_step
from bench.throughput import main, measure, named, ratios_of, share_of
from fastmoco.config import ConfigError, dump, parse

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def plan(*arguments: str) -> Options:
    return options(parser("throughput", ""), [*TINY, *arguments], trains=True)


def test_contest_of_step_and_published_step() -> None:
    results = measure(plan("--windows", "2", "--only", "step,official"))
    rows = {name: result.row(8) for name, result in results.items()}
    assert list(rows) == ["step", "official", "product"]
    # Two encoders of 37 MFLOP x 2 and the gradients: the loss is the one operation counted apart.
    assert rows["step"]["gflop_per_step"] == pytest.approx(2.3, rel=0.05)
    assert rows["step"]["gflop_per_step"] == pytest.approx(
        rows["official"]["gflop_per_step"], rel=0.01
    )
    assert all(row["n"] == 2 and row["p50_images_per_second"] > 0 for row in rows.values())
    assert ratios_of(results).keys() == {"our step / published step"}


def test_failure_of_a_contestant_is_told() -> None:
    nobody = Contestant(
        "nobody", "bench.steps.contestants:our_step", {"config": "run: {device: cuda}"}
    )
    with pytest.raises(ConfigError, match=r"nobody: .*cuda"):
        contest([nobody], windows=1, steps=1, warmup=1)
    wrong = Contestant("wrong", "math:sqrt", {"x": 1})
    with pytest.raises(RuntimeError, match="wrong failed"):
        contest([wrong], windows=1, steps=1, warmup=1)


def test_a_contestant_that_is_killed_is_one_sentence() -> None:
    gone = Contestant("gone", "os:_exit", {"status": 9})  # as the system ends who takes its memory
    with pytest.raises(ConfigError, match=r"process of gone was killed.*name fewer in --only"):
        contest([gone], windows=1, steps=1, warmup=1)


def test_synthetic_data_has_no_loader_to_time() -> None:
    assert named(plan()) == ["step", "encoder", "official", "official_kept"]


def test_who_is_fed_may_run_alone_on_images_but_not_on_synthetic_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--only", "loader"]) == 2
    assert "--only loader" in capsys.readouterr().err
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(16):
        picture = Image.new("RGB", (40, 40), (number, 0, 0))
        picture.save(tmp_path / "images" / f"{number}.png")
    images = ["--data.source", "folder", "--data.root", str(tmp_path / "images")]
    images += ["--data.workers", "1", "--run.dir", str(tmp_path / "run")]
    assert main([*TINY, *images, "--only", "loader", "--windows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\nloader\n" in printed
    assert "images_per_second" in printed


def test_allocator_of_the_host_is_no_matter_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.program.device_of", lambda config: torch.device("cuda"))
    assert named(plan()) == ["step", "encoder", "official"]
    assert plan().steps == 10


def test_allocator_setting_is_given_to_the_published_step_where_it_is_said() -> None:
    for kept, expected in ((False, 0), (True, 1)):
        with mock.patch("bench.steps.contestants.settle") as settle:
            official_step(dump(parse(TINY)), kept_memory=kept).close()
        assert settle.call_count == expected


def test_unknown_contestant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--only", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_share_of_the_product_rate_is_that_of_a_hand_computed_case() -> None:
    """20 GFLOP/s where a product makes 80; the median window counts."""
    windows = [Window(2, seconds, 1.0, 0.0) for seconds in (0.5, 1.0, 1.0)]
    step, product = (
        Result(windows, {"gflop_per_step": 10.0}),
        Result(windows, {"gflop_per_step": 40}),
    )
    assert share_of(product, step) == {"product_share_percent": 25.0}
    assert share_of(None, step) == share_of(product, Result(windows, {})) == {}
