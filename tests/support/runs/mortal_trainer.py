"""`fastmoco.train` that dies in step DEATH of its first life, as if it had been killed.

Of several ranks rank 1 dies. A rank that kills itself does so in the same step on a machine of any
speed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from fastmoco.method.step import Step
from fastmoco.train import main

DEATH = 9

lives = Step.__call__


def dies(step: Step, views: Any, number: int) -> Any:
    """`number` counts from 0."""
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if number == DEATH - 1 and first_life and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return lives(step, views, number)


if __name__ == "__main__":
    Step.__call__ = dies  # type: ignore[method-assign, assignment]
    sys.exit(main())
