"""Settings of this process on its host: cores that it may use, threads, memory that is kept.

Giving freed activations back to the kernel costs about a tenth of a step on the CPU, for every
large tensor is mapped, zeroed and unmapped again (rows "freed memory kept" of bench/results).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
from fastmoco.machine import environment

# From <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make malloc reuse freed memory instead of returning it; False where malloc is not glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has no mallopt
        return False
    # -1 is never; the largest int would be 2 GiB, which a step of ResNet-50 exceeds.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def peak_memory_bytes() -> int | None:
    """Most memory that this process has held at once; None where the system does not tell."""
    if resource is None:
        return None
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_seconds(proc: Path = Path("/proc")) -> float:
    """Processor time of this process and its children so far, in seconds.

    A child that still runs, as the loader's workers, counts on Linux only; elsewhere and when it
    has ended it counts as a whole.
    """
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in multiprocessing.active_children():
        try:
            # From the state on, as the name before it may hold blanks: proc(5), utime and stime.
            fields = (proc / str(child.pid) / "stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError, AttributeError):
            continue  # it has just ended, or the system has no such files
    return total


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def machine_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores for all ranks of this machine: what affinity and the container's quota allow."""
    allowed = len(affinity()) or os.cpu_count() or 1
    quota = _quota(cgroup)
    return min(allowed, max(1, int(quota))) if quota else allowed


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores for this rank: its share of `machine_cores`."""
    return max(1, machine_cores(cgroup) // local_ranks())


def local_ranks() -> int:
    """How many ranks of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def affinity() -> list[int]:
    """Numbers of the cores that this process may run on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def physical_cores(numbers: list[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores behind these hardware threads; as many as threads where the system does not say."""
    found = set()
    for number in numbers:
        try:
            siblings = (system / f"cpu{number}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(number)
        found.add(siblings.strip())
    return len(found)


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group grants; None without a limit."""
    try:
        if (cgroup / "cpu.max").is_file():
            limit, period = (cgroup / "cpu.max").read_text().split()
        else:  # version 1, where -1 is no limit
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        return float(limit) / float(period) if limit != "max" and float(limit) > 0 else None
    except (OSError, ValueError):
        return None


def load_average() -> float | None:
    """Runnable processes on this machine, averaged over a minute; None where nobody counts them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def choose_threads() -> None:
    """One compute thread per core of this rank, unless OMP_NUM_THREADS says how many.

    Two hardware threads of a core share its multipliers, so one of them is enough.
    No core is set aside for loader workers: the step fed by them is faster with all threads, or
    as fast where the loader limits (rows of bench/results/threads.jsonl). torchrun's own default
    for several ranks, one thread each, does not count as said.
    """
    if not _threads_are_given():
        physical = physical_cores(affinity()) or cores()
        torch.set_num_threads(min(cores(), max(1, physical // local_ranks())))


def _threads_are_given() -> bool:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return given != "" and not (local_ranks() > 1 and given == "1")


def settle(device: torch.device) -> str:
    """Choose allocator settings for training on `device`; one line that says what was chosen.

    Call it before anything large is allocated. CUDA tensors do not come from malloc, and a loader's
    staging memory is pinned, so on CUDA the allocator stays as it is.
    """
    kept = device.type == "cpu" and keep_freed_memory()
    memory = "kept in the process (glibc mallopt)" if kept else "default malloc"
    threads = torch.get_num_threads()
    chosen = "every core of this rank" if device.type == "cpu" else "torch's default"
    why = "as OMP_NUM_THREADS says" if _threads_are_given() else chosen
    return (
        f"host      {threads} compute thread{'s' * (threads > 1)} ({why}) on cores {_ranges()}, "
        f"{_waiting()}; freed memory: {memory}"
    )


def _waiting() -> str:
    """How long threads spin before they sleep, as libgomp was told when it was loaded."""
    policy, spins = (os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if policy:
        return f"OMP_WAIT_POLICY {policy.lower()}"
    late = " (too late: torch was loaded before fastmoco)" * environment.LATE
    return f"threads wait GOMP_SPINCOUNT {spins or 'default'}{late}"


def _ranges() -> str:
    """The affinity as `0-3,8`."""
    spans: list[list[int]] = []
    for core in affinity():
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "unknown"
