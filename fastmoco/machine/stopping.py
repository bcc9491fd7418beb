"""A request to stop that arrives as a signal: Ctrl-C, torchrun, a batch system, a notebook."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

REQUEUE = 75
"""Exit code of a run that a signal stopped before its end, after saving: start it again. It is
EX_TEMPFAIL of <sysexits.h>."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
# SIGUSR1 and SIGUSR2 come from SLURM before the time is up, SIGHUP when a connection is lost.
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
# Ctrl-C under torchrun arrives as SIGINT and, through the agent, as SIGTERM: one request.
ONE_REQUEST_S = 1.0
RENEWED_EVERY_S = 1.0


def exit_code(main: Callable[[], int]) -> int:
    """Exit code of a command; after Ctrl-C `INTERRUPTED` and one line, once all that it had begun
    has ended: its processes, and files that are not complete.

    While modules are imported, `environment` ends the program at once instead.
    """
    if threading.current_thread() is not threading.main_thread():
        return main()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        return interrupted()
    finally:  # a further Ctrl-C, while Python ends, needs no traceback either
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def interrupted() -> int:
    """Say so, once for all ranks; the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print("fastmoco: interrupted", file=sys.stderr, flush=True)
    return INTERRUPTED


class StopRequest:
    """While entered, a signal ends the program with a code of its own, and without a traceback.

    While `patient`, the first one only sets `made`: the loop saves and ends. At any other time, and
    for the second one, it raises `KeyboardInterrupt` (Ctrl-C) or `SystemExit`. Only the main thread
    of a process may handle signals: in any other, nothing is installed. On leaving, the handlers
    from before are back.
    """

    def __init__(self) -> None:
        self.made = self.patient = False
        self.code = REQUEUE
        self._at = self._renew_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                if number := getattr(signal, name, None):  # Windows has two of them
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def asked(self) -> bool:
        """Whether a signal has asked to stop. Call it in every step: it puts the handlers back.

        The first compilation of a Triton kernel installs LLVM's own, under Python's nose. Theirs
        stands for one signal only and then is nobody's, so the two that `timeout` sends at once
        ended runs on a GPU with nothing saved. Once per second, as it costs 40 us.
        """
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + RENEWED_EVERY_S
            for number in self._before:
                signal.signal(number, self._ask)
        return self.made

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: it was installed by something that is not Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), self.made
        if again and now - self._at < ONE_REQUEST_S:
            return
        self._at, self.made = now, True
        if number == signal.SIGINT:
            self.code = INTERRUPTED
        if again or not self.patient:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(self.code)
