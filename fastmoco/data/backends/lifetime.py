"""How reader processes handle signals that are meant for the trainer."""

from __future__ import annotations

import contextlib
import signal

# Longer than torchrun and batch systems wait between SIGTERM and SIGKILL.
GRACE_S = 60


def outlast_the_trainer() -> None:
    """Let a stop request that hits the whole process group end the trainer first.

    Ctrl-C, torchrun and batch systems signal readers as well as the trainer, which still needs
    batches until it has saved its state. SIGINT is ignored: the trainer ends its readers. SIGTERM
    takes effect after GRACE_S seconds, or at once when it comes a second time.
    """
    with contextlib.suppress(ValueError):  # only the main thread of a process may do this
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _later)


def _later(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):  # Windows ends processes without asking them
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what the trainer's program does then
        signal.alarm(GRACE_S)
