"""The stages for a GPU, rehearsed on the CPU: every part runs and its rows stand in the table."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from bench.measure import rows
from bench.on_gpu import __main__ as on_gpu
from bench.steps import contestants
from bench.steps.contestants import Bench
from bench.throughput import CONTESTANTS, named
from fastmoco.config import Config, ConfigError, dump, parse_text
from fastmoco.data.backends import choose
from fastmoco.method.cuda_graph import GIVES_UP
from tests.support.runs import one_process

CPU = torch.device("cpu")
BRIEF = 'import sys; print("ran"); sys.exit({})'


@pytest.fixture
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a bare image: git knows nothing, the commit comes by a variable."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("BENCH_COMMIT", "abc123")


@pytest.mark.usefixtures("no_git")
@pytest.mark.parametrize(
    ("stage", "written"),
    [
        ("kernels", {"ema official", "ema fastmoco"}),
        ("compiled", {"throughput silent"}),
        ("throughput", {"throughput step", "throughput official", "throughput encoder"}),
        ("loaders", {"throughput loader", "throughput end_to_end"}),
    ],
)
def test_every_part_of_a_stage_runs(
    stage: str, written: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(16):
        Image.new("RGB", (48, 40), (number, 9, 200)).save(tmp_path / f"{number}.jpg")
    images = [f"--data.root={tmp_path}"] if stage == "loaders" else []
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "rows")
    monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: "")  # the CPU's decoder for it
    for name, arguments in on_gpu.parts_of(stage, images, toy=True, out=tmp_path).items():
        if name in ("tests", "dali"):  # pytest within pytest; DALI need not be installed
            continue
        monkeypatch.setattr(sys, "argv", ["one_process", *arguments])
        assert one_process.main() == 0, name
    files = (tmp_path / "rows").glob("*.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = {f"{row['benchmark']} {row['contestant'].split(',')[0]}" for row in found}
    assert written <= names
    assert {row["environment"]["commit"] for row in found} == {"abc123"}
    if stage == "loaders":
        fed = {row["loader"].split()[0].strip(":") for row in found}
        assert fed == {"array", "nvjpeg"}


def test_both_sizes_of_the_compiled_step_and_pairs_that_fit_into_the_memory() -> None:
    compiled = on_gpu.parts_of("compiled", [], False, Path())
    sizes = [
        option.split("=")[1]
        for parts in compiled.values()
        for option in parts
        if "batch_size" in option
    ]
    assert sizes == ["256", "32", "32"]
    raced = on_gpu.parts_of("throughput", [], False, Path())
    pairs = [parts[-1].split(",") for parts in raced.values()]
    assert pairs == [["step", "official"], ["step", "encoder"]]


def test_a_failed_part_is_told_the_next_runs_and_the_limit_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "bad": ["-c", BRIEF.format(3)],
        "good": ["-c", BRIEF.format(0)],
        "endless": ["-c", "import time; time.sleep(1000)"],
        "late": ["-c", BRIEF.format(0)],
    }
    assert on_gpu.run_stage("kernels", tmp_path, 5.0, parts) == 1
    table = capfd.readouterr().out.split("kernels: rows")[1].splitlines()
    ends = [line.split("|")[2].strip() for line in table if line.startswith("| ")][1:]
    assert ends == [
        *("exit code 3", "done"),
        *("ended: the stage is out of time", "not begun: the stage is out of time"),
    ]
    assert "ran" in (tmp_path / "good.log").read_text()


@pytest.mark.usefixtures("no_git")
def test_rows_go_to_the_folder_and_are_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {"ops": on_gpu.parts_of("kernels", [], True, tmp_path)["ops"]}
    assert on_gpu.run_stage("kernels", tmp_path, 300.0, parts) == 0
    assert "ema: model resnet50" in capfd.readouterr().out
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) >= 3


def test_what_was_carried_is_found_after_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "CARRIED", tmp_path)
    with zipfile.ZipFile(tmp_path / "absent-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent_module.py", "print('carried')")
    variables = on_gpu.environment(tmp_path / "out")
    with mock.patch.dict("os.environ", variables):
        assert (
            on_gpu.run_stage("kernels", tmp_path / "out", 60.0, {"x": ["-m", "absent_module"]}) == 0
        )
    assert "carried" in (tmp_path / "out" / "x.log").read_text()
    assert variables["PYTHONPATH"].endswith("carried")
    assert variables["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "out"))


def test_loaders_without_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["loaders"]) == 2
    assert "--data.root" in capsys.readouterr().err


@pytest.mark.usefixtures("no_git")
def test_a_stage_whose_rows_could_not_be_kept_runs_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_stage(stage: str, *_: object) -> int:
        ran.append(stage)
        return 0

    monkeypatch.setattr(on_gpu, "run_stage", run_stage)
    arguments = ["kernels", "--toy", "--out", str(tmp_path)]
    assert on_gpu.main(arguments) == 0
    monkeypatch.delenv("BENCH_COMMIT")
    assert on_gpu.main(arguments) == 2
    assert ran == ["kernels"]
    assert capfd.readouterr().err == (
        "bench.on_gpu: No commit is known here: name it in the variable BENCH_COMMIT.\n"
    )


def test_a_silent_step_forbids_waiting_after_its_first_steps_and_only_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def step() -> None:
        calls.append("step")
        if calls[-2:] == ["error", "step"] and len(calls) > 6:
            raise RuntimeError("called a synchronizing CUDA operation")

    machine = Bench(torch.device("cuda"), step)
    monkeypatch.setattr(contestants, "our_step", lambda config: machine)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    silent = contestants.silent_step(dump(Config()))
    silent.run(1)
    with pytest.raises(ConfigError, match=r"makes the host wait.*synchronizing CUDA"):
        silent.run(1)
    assert calls == ["step"] * 3 + 2 * ["error", "step", "default"]


def test_a_captured_step_races_the_other_and_one_that_gives_up_its_graph_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = Namespace(config=Config(), device=torch.device("cuda"), only="silent,captured")
    assert named(both) == ["silent", "captured"]
    assert named(Namespace(**{**vars(both), "device": CPU})) == ["silent"]
    alone = {"silent", "captured", "cudnn_benchmark"}
    assert not alone & set(named(Namespace(**{**vars(both), "only": ""})))
    modes: list[tuple[str, bool]] = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # put back after the test

    def gives_up() -> None:
        warnings.warn(f"{GIVES_UP} (rank 0: a reason).", RuntimeWarning, stacklevel=2)

    def our_step(config: str) -> Bench:
        modes.append((parse_text(config).run.cuda_graph, torch.backends.cudnn.benchmark))
        return Bench(CPU, gives_up)

    monkeypatch.setattr(contestants, "our_step", our_step)
    for name in ("cudnn_benchmark", "silent", "captured"):
        with pytest.raises(ConfigError, match=r"CUDA graph .rank 0: a reason"):
            contestants.silent_step(dump(Config()), **CONTESTANTS[name].arguments)
    assert modes == [("off", True), ("off", False), ("on", False)]


def test_rows_of_a_commit_that_nobody_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    with pytest.raises(ConfigError, match="BENCH_COMMIT"):
        rows.origin(CPU, publish=True)
