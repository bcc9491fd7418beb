"""Cores, threads and allocator settings of the training process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from fastmoco.machine import host

SCRIPT = """
import resource, torch
from fastmoco.machine.host import settle
line = settle(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    for _ in range(4):
        torch.ones(2**26, dtype=torch.uint8)
for _ in range(5):  # until the heap has settled
    touch()
before = faults()
touch()
print(faults() - before, "|", line)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    faults, line = run.stdout.split("|")
    assert int(faults) < 1000  # 64 MiB are 16384 pages
    assert "kept in the process" in line


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_however_much_is_freed_stays() -> None:
    """3 GiB at once, of address space only: nothing is written."""
    script = """
import torch
from pathlib import Path
from fastmoco.machine.host import settle
settle(torch.device("cpu"))
def pages():
    return int(Path("/proc/self/statm").read_text().split()[0])
held = [torch.empty(2**28, dtype=torch.uint8) for _ in range(12)]
before = pages()
held.clear()
print(before - pages())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 0


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on cores 0 to 5, 8 and 9; nobody says how many threads or ranks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 8, 9}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores_are_those_that_affinity_and_quota_allow(
    eight_cores: None, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert host.cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("ranks", "said", "expected"),
    [
        ("1", None, 8),
        ("4", None, 2),
        ("4", "1", 2),  # torchrun's default, which nobody asked for
        ("1", "1", None),
        ("4", "3", None),
    ],
)
def test_every_core_computes_unless_the_user_says_otherwise(
    eight_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ranks: str,
    said: str | None,
    expected: int | None,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(host, "_quota", lambda cgroup: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    host.choose_threads()
    assert chosen == ([] if expected is None else [expected])


def test_the_choice_is_told(eight_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(host, "keep_freed_memory", lambda: False)
    line = host.settle(torch.device("cpu"))
    assert "8 compute threads (every core of this rank) on cores 0-5,8-9," in line
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert "8 compute threads (as OMP_NUM_THREADS says)" in host.settle(torch.device("cpu"))


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for number, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}.items():
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert host.physical_cores([0, 1, 4, 5], tmp_path) == 2
    assert host.physical_cores([0, 1, 5], tmp_path) == 2
    assert host.physical_cores([4], tmp_path) == 1
    assert host.physical_cores([7, 8], tmp_path) == 2  # nothing known about these


def _work_for(seconds: float, began: Event, end: Event) -> None:
    while time.process_time() < seconds:
        pass
    began.set()
    end.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="a child that runs counts on Linux only")
def test_processor_time_counts_a_child_once_while_it_runs_and_after_it() -> None:
    context = multiprocessing.get_context("spawn")
    began, end = context.Event(), context.Event()
    before = host.cpu_seconds(), time.process_time()
    child = context.Process(target=_work_for, args=(1.0, began, end))
    child.start()
    assert began.wait(120)
    own = time.process_time() - before[1]
    running = host.cpu_seconds() - before[0]
    end.set()
    child.join()
    ended = host.cpu_seconds() - before[0]
    assert running - own >= 0.95  # of the second that it worked; /proc counts in hundredths
    assert running - 0.05 <= ended < running + 0.9  # ending takes little, and it counts once
