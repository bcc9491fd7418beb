"""`fastmoco.train` as a user runs it: end to end, resumed, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmoco.config import ConfigError, OneRankError, parse
from fastmoco.data.backends.choose import has_dali
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import REQUEUE
from fastmoco.train import Run, main
from tests.support.data.two_classes import two_classes
from tests.support.runs.final_state import assert_same_bits, final_state

ROOT = Path(__file__).parent.parent
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
TINY = [
    *("--data.source", "synthetic", "--data.synthetic_samples", "48", "--augment.image_size", "32"),
    *("--model.arch", "resnet18", "--model.dim", "8", "--moco.queue_size", "40"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--optim.epochs", "2"),
    *("--run.device", "cpu", "--run.log_every", "2"),
]
NARROW = [*TINY, "--model.width", "0.25"]  # where the network does not matter


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.processor
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path, precision: str) -> None:
    """12 steps at once and 12 steps in three pieces end in the same bits, momentum included."""
    common = [*TINY, "--run.precision", precision]
    assert main([*common, "--run.dir", str(tmp_path / "whole")]) == 0
    for stop in ("4", "7", "0"):
        assert main([*common, "--run.dir", str(tmp_path / "parts"), "--run.max_steps", stop]) == 0
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    steps = {r["step"]: r["loss"] for r in records(tmp_path / "whole")}
    again = {r["step"]: r["loss"] for r in records(tmp_path / "parts")}
    assert steps[12] == pytest.approx(again[12], rel=1e-6)


def test_a_run_past_the_end_that_is_asked_for_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = [*NARROW, "--run.dir", str(tmp_path)]
    assert main([*common, "--run.max_steps", "4"]) == 0
    assert main([*common, "--run.max_steps", "2"]) == 0
    assert "stopped by a signal" not in capfd.readouterr().out
    assert [r["step"] for r in records(tmp_path)][-1] == 4


def test_a_complete_run_that_goes_on_elsewhere_exports_without_a_record(tmp_path: Path) -> None:
    assert main([*NARROW, "--run.dir", str(tmp_path / "first")]) == 0
    resumed = str(tmp_path / "first" / "latest.pth.tar")
    again = ["--run.resume", resumed, "--run.dir", str(tmp_path / "second")]
    assert main([*NARROW, *again]) == 0
    first, second = (load_file(tmp_path / n / "encoder.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_real_images_with_monitor_and_resume(tmp_path: Path) -> None:
    """Folder of JPEGs with train and test: everything the run directory promises is there."""
    two_classes(tmp_path / "data" / "train", 24, 0)
    two_classes(tmp_path / "data" / "test", 10, 1)
    run = tmp_path / "run"
    arguments = [
        *NARROW,
        *("--data.source", "folder", "--data.root", str(tmp_path / "data")),
        *("--data.backend", "pil", "--data.workers", "1", "--run.dir", str(run)),
        *("--knn.every", "1", "--knn.resize", "32", "--knn.k", "3", "--run.keep_checkpoints", "1"),
    ]
    assert main([*arguments, "--run.max_steps", "3"]) == 0
    assert main(arguments) == 0
    assert main(arguments) == 0  # nothing left to do is no error
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "views.png", "latest.pth.tar"} <= names
    assert "step 6, epoch 2.00" in (run / "report.html").read_text()
    assert [n for n in names if n.startswith("checkpoint_")] == [
        "checkpoint_0002_step00000006.pth.tar"
    ]
    assert any(name.startswith("events.out.tfevents") for name in names)
    kinds = [r["kind"] for r in records(run)]
    assert kinds.count("knn_baseline") == 1
    accuracies = [r["knn_top1"] for r in records(run) if r["kind"] == "knn"]
    assert len(accuracies) >= 2
    assert all(0 <= a <= 1 for a in accuracies)
    assert final_state(run)["module.queue_ptr"].item() == 6 * 8 % 40


@pytest.mark.parametrize("source", ["list", "shards"])
def test_the_views_of_every_source_are_drawn(source: str, tmp_path: Path) -> None:
    """Alarms ask to look at them."""
    two_classes(tmp_path / "train", 12, 0)
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in files))
    with tarfile.open(tmp_path / "shards", "w") as tar:
        for path in files:
            tar.add(path, path.name)
    data = ["--data.source", source, "--data.root", str(tmp_path / source), "--knn.every", "0"]
    run = tmp_path / "run"
    assert main([*NARROW, *data, "--run.dir", str(run), "--run.max_steps", "1"]) == 0
    with Image.open(run / "views.png") as drawn:
        assert min(drawn.size) > 96 * 3  # three columns, and a row for each of 8 images


def test_a_signal_during_knn_is_not_lost(tmp_path: Path) -> None:
    """It stops the run at the next step, and what was trained until then is saved."""
    two_classes(tmp_path / "data" / "train", 24, 0)
    two_classes(tmp_path / "data" / "test", 10, 1)
    arguments = [
        *(*NARROW, "--data.source", "folder", "--data.root", str(tmp_path / "data")),
        *("--data.workers", "1", "--run.dir", str(tmp_path / "run"), "--optim.epochs", "9"),
        *("--knn.every", "1", "--knn.resize", "32", "--run.checkpoint_every", "1000"),
    ]
    run = Run(parse(arguments), World(0, 0, 1, torch.device("cpu"), "none"))
    calls = []

    def trained(_: object) -> float:
        calls.append(run.done)
        run.request.made = len(calls) == 2  # the first is of the untrained encoder
        return 0.5

    assert run.monitor is not None
    run.monitor.trained = trained  # type: ignore[method-assign, assignment]
    run.train()
    assert calls == [0, 3]
    saved = torch.load(tmp_path / "run" / "latest.pth.tar", weights_only=True)
    assert saved["fastmoco"]["step"] == run.done == 4


def test_bad_files_are_replaced_counted_and_listed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two_classes(tmp_path / "images", 16, 0)
    first = sorted((tmp_path / "images").rglob("*.jpg"))[0]
    first.write_bytes(first.read_bytes()[:-500])  # only reading all of it shows that
    arguments = [*NARROW, "--data.source", "folder", "--data.root", str(tmp_path / "images")]
    arguments += ["--data.max_bad_share", "0.1", "--knn.every", "0", "--data.workers", "1"]
    run = tmp_path / "run"
    assert main([*arguments, "--run.dir", str(run)]) == 0
    assert [r["bad_samples"] for r in records(run) if r["kind"] == "train"][-1] == 1
    assert "1 bad samples so far" in "".join(capfd.readouterr())
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [Path(row["name"]) for row in listed] == [first]
    assert (
        main([*arguments, "--run.dir", str(tmp_path / "strict"), "--data.max_bad_share", "0"]) == 2
    )
    assert "max_bad_share" in capfd.readouterr().err


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Exit code 2, and one sentence on standard error."""
    assert main([*NARROW, *arguments]) == 2
    lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith("fastmoco: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["--run.dir", str(tmp_path / "run")]
    folder = ["--data.source", "folder", "--data.backend", "pil", *run]
    assert "data.root" in refused(capfd, *folder)
    assert "nowhere" in refused(capfd, *folder, "--data.root", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capfd, *folder, "--data.root", str(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    assert "text" in refused(capfd, *folder, "--data.root", str(tmp_path / "text"))
    assert "exceeds" in refused(capfd, *run, "--data.synthetic_samples", "7")
    assert "divisible" in refused(capfd, *run, "--optim.accumulate", "3")
    assert "kNN" in refused(capfd, *run, "--knn.every", "1")
    if not torch.cuda.is_available():
        assert "CUDA" in refused(capfd, *run, "--run.device", "cuda")


def test_run_directory_of_another_run_is_not_touched(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ["--run.dir", str(tmp_path / "run")]
    assert main([*NARROW, *run, "--run.max_steps", "2"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    sentence = refused(capfd, *run, "--moco.temperature", "0.5")
    assert "moco.temperature (0.2 there, 0.5 now)" in sentence
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert "run.resume is never" in refused(capfd, *run, "--run.resume", "never")
    other = ["--run.dir", str(tmp_path / "other")]
    latest = tmp_path / "run" / "latest.pth.tar"
    assert "moco.temperature" in refused(
        capfd, *other, "--run.resume", str(latest), "--moco.temperature", "0.5"
    )
    changed = ["--optim.epochs", "3", "--run.resume_changes", "allow"]
    assert main([*NARROW, *run, *changed]) == 0
    assert "optim.epochs 2 -> 3" in capfd.readouterr().out
    assert records(tmp_path / "run")[-1]["step"] == 18
    run += changed
    assert "not a file" in refused(capfd, *other, "--run.resume", str(tmp_path / "no.pth.tar"))
    for path in (tmp_path / "run").glob("checkpoint_*"):
        path.write_bytes(b"half a checkpoint")
    assert "cannot be resumed" in refused(capfd, *run)
    (tmp_path / "run" / "config.yaml").write_text("optim: [")
    assert "config.yaml cannot be read as a configuration" in refused(capfd, *run)


@pytest.mark.skipif(os.geteuid() == 0, reason="the super user may write anywhere")
def test_unwritable_run_directory(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused(capfd, "--run.dir", str(tmp_path / "locked" / "run"))


def test_run_directory_that_is_a_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capfd, "--run.dir", str(tmp_path / "file" / "run"))


def test_the_host_is_settled_and_kernels_checked_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str, answer: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            order.append(name)
            if name == "build_moco":
                raise ConfigError("far enough")
            return answer

        return call

    monkeypatch.setattr("fastmoco.machine.host.settle", noted("settle", "host"))
    monkeypatch.setattr("fastmoco.train.check", noted("check", None))
    monkeypatch.setattr("fastmoco.method.agreement.agree_on_kernels", noted("kernels", []))
    monkeypatch.setattr("fastmoco.train.build_moco", noted("build_moco", None))
    config = parse([*NARROW, "--run.dir", str(tmp_path)])
    for device, expected in (("cpu", []), ("cuda", ["kernels"])):
        order.clear()
        with pytest.raises(ConfigError, match="far enough"):
            Run(config, World(0, 0, 1, torch.device(device), "none"))
        assert order == ["check", "settle", *expected, "build_moco"]


def test_divergence_stops_the_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*NARROW, "--run.dir", str(tmp_path), "--optim.lr", "1e30"]) == 1
    assert "lower optim.lr" in capfd.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The trainer as a process group of its own, as torchrun starts it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastmoco.train", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", [ConfigError, OneRankError, ChildProcessError, OSError])
def test_a_rank_says_itself_what_it_alone_may_have_met(
    rank: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> NoReturn:
        raise error("this is why")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("fastmoco.train.Run", fails)
    monkeypatch.setattr("fastmoco.train.join_world", lambda _: None)
    assert main(TINY) == (2 if issubclass(error, ConfigError) else 1)
    alone = error is not ConfigError
    told = "fastmoco: this is why\n" if rank == "0" or alone else ""
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("backend", ["array", pytest.param("dali", marks=needs_dali)])
def test_a_signal_to_the_group_saves_and_the_same_command_resumes(
    tmp_path: Path, backend: str
) -> None:
    """Readers get the signal too, and must last until the trainer has saved."""
    two_classes(tmp_path / "data", 24, 0)
    arguments = [
        *(*NARROW, "--run.dir", str(tmp_path / "run"), "--optim.epochs", "100000"),
        *("--data.source", "folder", "--data.root", str(tmp_path / "data")),
        *("--data.backend", backend, "--data.workers", "1", "--run.checkpoint_every", "100000"),
    ]
    process = start(arguments)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or len(log.read_text()) < 500:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == REQUEUE, output
    assert "stopped by a signal" in output
    done = torch.load(tmp_path / "run" / "latest.pth.tar", weights_only=True)["fastmoco"]["step"]
    assert done == records(tmp_path / "run")[-1]["step"]
    assert main([*arguments, "--run.max_steps", str(done + 2)]) == 0
    assert records(tmp_path / "run")[-1]["step"] == done + 2


@pytest.mark.parametrize("place", ["resuming.find", "sum_up", "build_moco"])
def test_a_rank_that_dies_at_any_time_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """At the start and after the last step too, where gloo's own error ended in a traceback."""

    def lost(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")

    monkeypatch.setattr(f"fastmoco.train.{place}", lost)
    stop = ["--run.precision=fp32", "--run.max_steps=1", "--run.dir", str(tmp_path / "run")]
    assert main([*NARROW, *stop]) == 1
    sentence = capsys.readouterr().err
    assert sentence.startswith("fastmoco: rank 0 of 1, ")
    assert "because another rank died or hangs" in sentence
