"""Signals: which are heard, when they end the program, and with which code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmoco.machine import stopping
from fastmoco.machine.stopping import INTERRUPTED, REQUEUE, StopRequest, exit_code

ASKING = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_asks_once_and_the_next_one_ends(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StopRequest() as request:
        request.patient = True
        signal.raise_signal(number)
        assert request.made
        assert request.code == REQUEUE
        signal.raise_signal(number)  # the same request, by way of an agent
        monkeypatch.setattr(stopping, "ONE_REQUEST_S", -1.0)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(number)
        assert ended.value.code == REQUEUE


def test_before_the_loop_a_signal_ends_at_once() -> None:
    for number in ASKING:
        with StopRequest(), pytest.raises(SystemExit) as ended:
            signal.raise_signal(number)
        assert ended.value.code == REQUEUE
    with StopRequest() as request, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert request.code == INTERRUPTED


def test_handlers_from_before_are_back() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    with StopRequest():
        assert [signal.getsignal(number) for number in ASKING] != before
    assert [signal.getsignal(number) for number in ASKING] == before


def test_a_handler_of_the_caller_is_back_as_well() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGUSR1) != mine
        assert signal.getsignal(signal.SIGUSR1) == mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_that_were_taken_are_put_back_once_per_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    with StopRequest() as request:
        ours = signal.getsignal(signal.SIGUSR1)
        for later, back in ((0.0, True), (0.5, False), (0.6, True), (1.1, True)):
            clock += later
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            request.asked()
            assert (signal.getsignal(signal.SIGUSR1) == ours) == back


COMPILES = """
import ctypes, os, signal
from fastmoco.machine.stopping import StopRequest

with StopRequest() as request:
    request.patient = True
    # What a native library does, and what Python does not see.
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(int(signal.SIG_DFL)))
    assert not request.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    print("asked" if request.asked() else "not asked")
"""


def test_a_handler_that_a_native_library_took_is_put_back() -> None:
    ran = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "asked\n"), ran.stderr


IMPORTS_TORCH = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("torch", ["-m", "fastmoco.train"]),
        ("torchvision", ["-um", "fastmoco", "train"]),
        ("tensorboard", ["-X", "utf8", "-umfastmoco.train"]),
        ("fastmoco.run", ["-m", "fastmoco.train", "-m", "x"]),
    ],
)
def test_an_interrupt_while_modules_are_imported_leaves_no_traceback(
    tmp_path: Path, moment: str, options: list[str]
) -> None:
    """The trainer as it is started; the signal comes when it imports this module."""
    root = Path(__file__).resolve().parents[2]
    code = IMPORTS_TORCH.replace("sys.argv[1]", repr(moment))
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, *options, "--run.dir", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_interrupted_command_ends_what_it_began_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    def while_importing(*_: object) -> None:
        pytest.fail("the handler of imports is still there")

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        finally:
            ended.append(True)
        return 0

    ended: list[bool] = []
    monkeypatch.setenv("RANK", rank)
    before = signal.signal(signal.SIGINT, while_importing)
    try:
        assert exit_code(work) == INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is while_importing
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended
    assert capsys.readouterr().err == ("fastmoco: interrupted\n" if rank == "0" else "")


def test_a_library_that_imports_fastmoco_keeps_its_handler() -> None:
    # Set first: what was started in the background of a shell ignores SIGINT.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import fastmoco; "
        "print(signal.getsignal(signal.SIGINT).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "default_int_handler"
