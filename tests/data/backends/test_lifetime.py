"""Whatever ends the trainer, no reader process and no shared memory outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.data.backends.choose import has_dali
from tests.support.runs.sessions import all_ended, begun, members

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path("/dev/shm")
PROGRAM = """
import signal
import sys
import torch
from fastmoco.config import AugmentConfig, Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends import choose
from fastmoco.data.loader import build_loader

root, run, backend, end = sys.argv[1:]
choose.why_no_nvjpeg = lambda device: ""  # the decoder of the CPU in its place
config = Config(
    run=RunConfig(dir=run),
    data=DataConfig(root=root, backend=backend, workers=2, threads=1),
    augment=AugmentConfig(image_size=64),
    optim=OptimConfig(global_batch_size=32),
)
if __name__ == "__main__":
    # A shell that starts the tests in the background has its children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with build_loader(config, device=torch.device("cpu")) as loader:
        for step, batch in enumerate(loader.batches(0, 100_000)):
            print(step, flush=True)
            if step == 1 and end == "exception":
                raise RuntimeError("boom")
"""
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def shared_memory_of(processes: set[int]) -> set[str]:
    """Names in /dev/shm that carry the id of one of the processes, as torch's do."""
    tags = {f"_{process}_" for process in processes}
    return {path.name for path in SHARED.iterdir() if any(tag in path.name for tag in tags)}


@pytest.mark.parametrize(
    ("backend", "end"),
    [
        ("array", "interrupt"),
        ("array", "exception"),
        ("array", "kill"),
        ("nvjpeg", "interrupt"),
        ("nvjpeg", "exception"),
        ("nvjpeg", "kill"),
        pytest.param("dali", "interrupt", marks=needs_dali),
        pytest.param("dali", "kill", marks=needs_dali),
    ],
)
def test_nothing_is_left(photos: Path, tmp_path: Path, backend: str, end: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = begun(str(program), str(photos), str(tmp_path / "run"), backend, end)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            if line.strip() == "1":
                break
        else:
            pytest.fail(process.stderr.read())
        family = members(process.pid)
        assert len(family) > 1 or end == "exception"
        if end == "interrupt":
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
        elif end == "kill":
            process.kill()
        process.stdout.read()
        process.wait()
        assert all_ended(process.pid, 600)  # torch's workers look for their parent every 5 s
        assert not shared_memory_of(family)
        assert process.returncode == {"interrupt": -2, "exception": 1, "kill": -9}[end]
        if end == "interrupt":  # only the parent says what happened
            assert process.stderr.read().count("Traceback") <= 1
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)


SPAWNED = """
import multiprocessing
import sys
from program import main

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=main, args=sys.argv[1:])
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
MAIN = """
import torch
from fastmoco.config import AugmentConfig, Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader

def main(root, run):
    config = Config(
        run=RunConfig(dir=run),
        data=DataConfig(root=root, backend="array", workers=2),
        augment=AugmentConfig(image_size=224),
        optim=OptimConfig(global_batch_size=32),
    )
    with build_loader(config, device=torch.device("cpu")) as loader:
        assert len(list(loader.batches(0, 3))) == 3
"""


def test_a_trainer_that_was_spawned_closes_its_readers(photos: Path, tmp_path: Path) -> None:
    """As under torch.multiprocessing.spawn: children of such a process are spawned by default."""
    (tmp_path / "program.py").write_text(MAIN)
    (tmp_path / "start.py").write_text(SPAWNED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "start.py"), str(photos), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


ALARM = """
import os, signal, sys, time
from fastmoco.data.backends import lifetime

signal.signal(signal.SIGALRM, lambda *_: sys.exit("the trainer's own alarm"))
lifetime.GRACE_S = 1
reader = os.fork()
if reader:
    os.write(1, f"{reader}\\n".encode())
    _, status = os.waitpid(reader, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    lifetime.outlast_the_trainer()
    os.write(1, b"begin\\n")
    while True:
        time.sleep(1)
"""


def test_a_reader_outlasts_a_request_for_a_while(tmp_path: Path) -> None:
    """And ends then, whatever an alarm means to the program that it was forked from."""
    program = tmp_path / "program.py"
    program.write_text(ALARM)
    process = begun(str(program))
    assert process.stdout is not None
    try:
        reader, begin = sorted((process.stdout.readline(), process.stdout.readline()))
        assert begin == "begin\n"
        os.kill(int(reader), signal.SIGTERM)
        status, errors = process.communicate(timeout=60)
        assert (int(status), errors) == (-signal.SIGALRM, "")
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
