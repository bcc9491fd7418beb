"""Variables that libraries read when torch is loaded; `fastmoco` imports this before anything else.

Standard library only: nothing here may load torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path

# How far `FASTMOCO_CPU=avx2` (see `fastmoco_kernels.processor`) caps the libraries of torch.
_CAPPED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
# Turns of the loop in which a thread of GNU OpenMP waits for the others before it sleeps. libgomp's
# own count lasts some milliseconds: beside three busy processes on two cores a step then takes 1.8
# times as long as with this one. With 1000 it takes 0.7 of it there, but 1.06 on idle cores, which
# is where people train (rows of bench/results/threads.jsonl).
SPIN_COUNT = "10000"
LIBGOMP_SPIN_COUNT = "300000"
"""What libgomp takes where neither variable is set."""


def settle_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what `FASTMOCO_CPU` and good neighbourhood ask for; what the user has set stays."""
    for name, value in _CAPPED.get(environment.get("FASTMOCO_CPU", ""), {}).items():
        environment[name] = value
    if "OMP_WAIT_POLICY" not in environment and sys.platform.startswith("linux"):
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def leave_quietly_on_interrupt() -> None:
    """Ctrl-C while modules are imported ends a program of ours without a traceback.

    Nothing has started yet that would have to end first; `main` handles signals from then on.
    """
    arguments: list[str] = getattr(sys, "argv", None) or [""]
    program = Path(arguments[0]).stem
    if program == "-m":  # so it is called while Python looks for the module
        # Stands before the arguments, by itself or with options, as in `-umfastmoco.train`.
        word = "".join(sys.orig_argv[-len(arguments) :][:1])
        module = word.partition("m")[2] if word.startswith("-") else word
        program = module.split(".")[0]
    if program == "fastmoco" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


settle_environment()
leave_quietly_on_interrupt()
LATE = "torch" in sys.modules
"""Whether torch was loaded before, so that the variables above come too late for this process."""
