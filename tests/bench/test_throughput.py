"""A small contest in real processes: every contestant runs and its facts are right."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from bench.measure.contest import Contestant, contest
from bench.measure.product import Rate
from bench.steps.contestants import official_step
from bench.throughput import main, measure, options, ratios_of, summary
from fastmoco.config import ConfigError, dump, parse

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def test_contest_of_step_and_published_step() -> None:
    plan, config = options([*TINY, "--windows", "2", "--only", "step,official"])
    results = measure(plan, config)
    rows = {name: summary(result, 8) for name, result in results.items()}
    assert rows["step"]["host_syncs"] == 0
    # Two encoders of 37 MFLOP x 2 and the gradients: the loss is the one operation counted apart.
    assert rows["step"]["gflop_per_step"] == pytest.approx(2.3, rel=0.05)
    assert rows["step"]["gflop_per_step"] == pytest.approx(
        rows["official"]["gflop_per_step"], rel=0.01
    )
    assert rows["official"]["host_syncs"] == 4  # loss, top-1, top-5 and queue_ptr
    assert all(row["n"] == 2 and row["p50_images_per_second"] > 0 for row in rows.values())
    assert ratios_of(results).keys() == {"our step / published step"}


def test_failure_of_a_contestant_is_told() -> None:
    nobody = Contestant(
        "nobody", "bench.steps.contestants:our_step", {"config": "run: {device: cuda}"}
    )
    with pytest.raises(RuntimeError, match="nobody failed"):
        contest([nobody], windows=1, steps=1, warmup=1)


def test_a_contestant_that_is_killed_is_one_sentence() -> None:
    gone = Contestant("gone", "os:_exit", {"status": 9})  # as the system ends who takes its memory
    with pytest.raises(ConfigError, match=r"process of gone was killed.*name fewer in --only"):
        contest([gone], windows=1, steps=1, warmup=1)


def test_synthetic_data_has_no_loader_to_time() -> None:
    plan, _ = options(TINY)
    assert plan.only == ["step", "encoder", "official", "official_kept"]


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
    assert "loader alone" in printed
    assert "\n1 windows of each" in printed


def test_allocator_of_the_host_is_no_matter_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.throughput.device_of", lambda config: torch.device("cuda"))
    plan, _ = options(TINY)
    assert plan.only == ["step", "encoder", "official"]
    assert plan.steps == 10


def test_allocator_setting_is_given_to_the_published_step_where_it_is_said() -> None:
    for kept, expected in ((False, 0), (True, 1)):
        with mock.patch("bench.steps.contestants.settle") as settle:
            official_step(dump(parse(TINY)), kept_memory=kept).close()
        assert settle.call_count == expected


def test_unknown_contestant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        options([*TINY, "--only", "nonsense"])
    assert main([*TINY, "--only", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_share_of_the_product_rate_is_that_of_a_hand_computed_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A product of 2 * 2048**3 FLOPs in a fifth of a second: 86 GFLOP/s."""
    seconds = iter([0.0, 0.2, 1.0, 1.2])
    monkeypatch.setattr("bench.measure.product.time.perf_counter", lambda: next(seconds))
    rate = Rate()
    assert rate.summary() == {}
    rate.measure()
    rate.measure()
    assert rate.summary() == {"product_gflops": [85.9, 85.9, 85.9]}
    row = {"gflop_per_step": 10.0, "p50_images_per_second": 16.0}  # 20 GFLOP/s at 8 images a step
    assert rate.share(row, 8) == {"product_share_percent": 23.3}
    assert rate.share({"p50_images_per_second": 16.0}, 8) == {}
