"""A request to stop that arrives as a signal: Ctrl-C, torchrun, a batch system, a notebook."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C under torchrun arrives as SIGINT and, through the agent, as SIGTERM: one request.
ONE_REQUEST_S = 1.0


class StopRequest:
    """While entered, SIGTERM and SIGINT set `made` instead of ending the process.

    A second SIGINT raises `KeyboardInterrupt`. Only the main thread of a process may handle
    signals: in any other, nothing is installed. On leaving, the handlers from before are back.
    """

    def __init__(self) -> None:
        self.made = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGINT):
                self._before[name] = signal.signal(name, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, handler in self._before.items():
            # None: it was installed by something that is not Python and cannot be put back.
            signal.signal(name, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.made and now - self._at > ONE_REQUEST_S:
            raise KeyboardInterrupt  # asked again: do not wait for the next flush
        self._at, self.made = now, True
