"""The lock beside a cache: it saves work, and never holds a process up for ever."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from fastmoco.machine import cache

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")


def test_a_process_that_never_lets_go_is_named_and_then_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TOLD_AFTER_S", 0.0)
    monkeypatch.setattr(cache, "LIMIT_S", 0.2)
    path, said = tmp_path / "index.lock", list[str]()
    with cache.exclusive(path, said.append):
        assert not said
        with cache.exclusive(path, said.append):
            waiting, passed = said
    assert str(path) in waiting
    assert "going on without it" in passed


def test_the_second_begins_when_the_first_has_ended(tmp_path: Path) -> None:
    path, order = tmp_path / "index.lock", list[str]()
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with cache.exclusive(path, order.append):
            order.append("second")

    with cache.exclusive(path, order.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert begun.wait(300)
        thread.join(0.3)
        order.append("first")
    thread.join(300)
    assert order == ["first", "second"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names there")
def test_a_pipe_for_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.lock")
    entered = threading.Event()

    def enter() -> None:
        with cache.exclusive(tmp_path / "a.lock"):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)
