"""One process owns a run directory: two runs in one folder would mix their records and checkpoints.

The owner writes its host, process and start time into a file and touches the file now and then.
A file that is left by a killed process gives way: on the same host the process is looked up, and
for another host the file is watched for a while. Locks of file systems are not asked, because those
of network file systems and containers often answer yes to everybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastmoco.machine import durable

NAME = "owner.json"
BEAT_S = 10.0
"""Seconds between two signs of life."""
SILENCE_S = 45.0
"""An owner on another host that gave no sign for so long is dead."""
SETTLE_S = 0.1
REFUSAL = "belongs to process"
"""Is in the sentence of every `OwnedError`, and in no other: it tells who was refused."""


class OwnedError(RuntimeError):
    """Another process owns the folder. The message is one sentence for the user."""


@dataclass(frozen=True)
class Mark:
    """Who owns a folder."""

    host: str
    process: int
    started: str
    """When the process began, as its system counts; empty where it does not tell."""
    since: str
    """Local time at which it took the folder, for people."""
    token: str
    """Of this claim alone."""


def this_host() -> str:
    """Name of this host and of its current start: process numbers mean nothing after the next."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}"
    return socket.gethostname()


def start_of(process: int) -> str | None:
    """When a process of this host began; None if it has ended, empty if the system does not say."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        # After the name in brackets, which may hold blanks: the state, and 19 further on the start.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def read_mark(folder: Path) -> Mark | None:
    """The mark of a folder; None where there is none, or a damaged one, which binds nobody."""
    try:
        mark = Mark(**json.loads(durable.read_regular(folder / NAME)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"process": int}
    whole = all(isinstance(v, kinds.get(n, str)) for n, v in vars(mark).items()) and mark.host
    return mark if whole else None


def require_free(folder: Path, say: Callable[[str], None] = print) -> None:
    """Raise `OwnedError` if a live process owns the folder.

    For an owner on another host this can take `SILENCE_S` seconds, which `say` announces.
    """
    mark = read_mark(folder)
    if mark is not None and _alive(folder, mark, say):
        raise OwnedError(
            f"{folder} {REFUSAL} {mark.process} on {mark.host.split()[0]}, which has been at work "
            f"there since {mark.since}: wait for its end, or choose another run.dir."
        )


def _lives_here(mark: Mark) -> bool | None:
    """Whether its process lives; None where this host cannot tell."""
    if mark.host == this_host() and mark.started:
        return start_of(mark.process) == mark.started
    return None


def _alive(folder: Path, mark: Mark, say: Callable[[str], None]) -> bool:
    if (lives := _lives_here(mark)) is not None:
        return lives
    # Another host, or nobody tells: does the file still change? No clock but this one is asked.
    say(f"waiting up to {SILENCE_S:g} s for a sign of the owner of {folder}, {mark.host}")
    before, began = _touched(folder), time.monotonic()
    while time.monotonic() - began < SILENCE_S:
        time.sleep(min(1.0, SILENCE_S))
        if (now := _touched(folder)) is None:
            return False  # it has ended and taken its mark with it
        if now != before:
            return True
    return False


def _touched(folder: Path) -> int | None:
    try:
        return (folder / NAME).stat().st_mtime_ns
    except OSError:
        return None


class Watch:
    """Who owns a folder, for somebody who asks now and then; no question waits.

    An owner on another host lives until it has given no sign for `SILENCE_S` since it was seen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sign: int | None = None
        self._seen = 0.0

    def owner(self) -> Mark | None:
        """The mark of a living process, None where there is none."""
        mark = read_mark(self._folder)
        if mark is None:
            return None
        if (lives := _lives_here(mark)) is not None:
            return mark if lives else None
        sign, now = _touched(self._folder), time.monotonic()
        if sign != self._sign:
            self._sign, self._seen = sign, now
        return mark if now - self._seen < SILENCE_S else None


class Owner:
    """While entered, this process owns the folder and gives signs of life.

    Entering raises `OwnedError` as `require_free` does, and `OSError` where nothing can be written.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self._folder, self._enabled = folder, enabled
        self._ended = threading.Event()
        self._mark = Mark(
            this_host(),
            os.getpid(),
            start_of(os.getpid()) or "",
            time.strftime("%Y-%m-%d %H:%M:%S"),
            str(uuid.uuid4().int),  # digits: such a name is swept where a killed claim left it
        )

    def __enter__(self) -> Owner:
        if not self._enabled:
            return self
        self._claim()
        threading.Thread(target=self._beat, name="owner", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._enabled and self.holds():
            with contextlib.suppress(OSError):
                (self._folder / NAME).unlink()

    def holds(self) -> bool:
        """Whether the mark in the folder is still this one."""
        return read_mark(self._folder) == self._mark

    def _claim(self) -> None:
        """Of several processes that find a dead owner's mark at once, one gets the folder."""
        path = self._folder / NAME
        whole = path.with_name(f".{NAME}.{self._mark.token}")
        whole.write_text(json.dumps(asdict(self._mark)), encoding="utf-8")
        try:
            while not self.holds():
                dead = read_mark(self._folder)
                require_free(self._folder)
                if os.path.lexists(path) and read_mark(self._folder) == dead:
                    path.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):
                    _link(whole, path)
            time.sleep(SETTLE_S)  # one that judged the same dead mark may have come just after
            if not self.holds():
                require_free(self._folder)
        finally:
            whole.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.holds():
                    os.utime(self._folder / NAME)


def _link(whole: Path, path: Path) -> None:
    """Give a complete file its second name. Raises `FileExistsError` where there is one."""
    try:
        os.link(whole, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        with path.open("x", encoding="utf-8") as opened:
            opened.write(whole.read_text(encoding="utf-8"))
