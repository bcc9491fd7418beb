"""What the system grants a process beyond memory: shared memory and open files."""

from __future__ import annotations

import os
from pathlib import Path

from fastmoco.machine.host import local_ranks

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps the shared memory by which workers hand over what they have made."""
# Of what is free: other programs take some as well.
_SHARE = 0.9
# A process opens files for its images, its logs and compiled kernels.
_OTHER_FILES = 64


def shared_memory() -> int | None:
    """Bytes of shared memory that this rank may take; None where the system sets no limit.

    The ranks of a machine take equal parts of what is free.
    """
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return int(found.f_bavail * found.f_frsize * _SHARE) // local_ranks()


def files_left(needed: int) -> int | None:
    """How many more files this process may open; None where the system sets no limit.

    A limit that a process may raise by itself is raised first, as far as `needed` asks for.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _open_files() + needed + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return None if soft == resource.RLIM_INFINITY else soft - _open_files() - _OTHER_FILES


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
