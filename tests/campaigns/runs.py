"""Tiny runs of the trainer for the campaigns, each a process of its own that starts at once.

A campaign imports the trainer and forks: importing it takes longer than such a run. It starts
itself anew with `disk_faults.c` below it, which is off until a run asks for it.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PLACE = "FASTMOCO_CAMPAIGN"
"""Environment variable with the folder of a campaign; set once the disk is below it."""
LIMIT_S = 1800.0
"""A run that takes longer hangs: one takes five seconds on an idle machine."""
OPERATIONS = {"open": 1, "write": 2, "fsync": 4, "rename": 8}
"""Kinds of operations on files, as `disk_faults.c` numbers them."""
SMALL = [
    *("--augment.image_size=32", "--model.arch=resnet18", "--model.width=0.25", "--model.dim=8"),
    *("--moco.queue_size=16", "--moco.bn_group_size=4", "--optim.global_batch_size=8"),
    *("--optim.epochs=5", "--run.device=cpu", "--run.precision=fp32", "--run.log_every=1"),
    *("--data.workers=1", "--data.max_bad_share=0.1", "--run.timeout_s=600"),
    *("--knn.every=2", "--knn.k=3", "--knn.resize=32"),
    "--run.checkpoint_minutes=0.004",  # so that checkpoints fall on any step
]


def begin(argv: Sequence[str]) -> Path:
    """The folder of this campaign; the first call starts the program anew with the disk below."""
    if PLACE in os.environ:
        return Path(os.environ[PLACE])
    place = Path(tempfile.mkdtemp(prefix="fastmoco-campaign-"))
    library = place / "disk_faults.so"
    source = Path(__file__).with_name("disk_faults.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True
    )
    known = Path(os.environ.get("FASTMOCO_CACHE") or Path.home() / ".cache" / "fastmoco")
    for kernels in known.glob("kernels*"):  # compiling them again would be the longest part
        shutil.copytree(kernels, place / "cache" / kernels.name, dirs_exist_ok=True)
    environment = os.environ | {
        PLACE: str(place),
        "LD_PRELOAD": str(library),
        "FASTMOCO_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    code = subprocess.run([sys.executable, *argv], env=environment, check=False).returncode
    shutil.rmtree(place, ignore_errors=True)
    sys.exit(code)


def pictures(folder: Path) -> list[str]:
    """24 images and 12 labelled ones to test with, and the options that name them.

    The second one is cut short, so that another stands for it.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for index in range(count):
            path = folder / split / "ab"[index % 2] / f"{index:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    broken = folder / "train" / "b" / "01.jpg"
    broken.write_bytes(broken.read_bytes()[:-500])
    return [f"--data.root={folder / 'train'}", f"--knn.test_root={folder / 'test'}"]


@dataclass
class Life:
    """One start of the command, on some ranks, until its end."""

    pids: list[int]
    output: Path
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes by process; negative: the number of the signal."""
    hung: bool = False

    @property
    def text(self) -> str:
        """All that its ranks have printed."""
        return self.output.read_text(errors="replace")

    def ended(self) -> bool:
        """Whether all ranks have; never waits."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = LIMIT_S) -> bool:
        """Whether it ends within some time."""
        limit = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
        return True

    def finish(self, seconds: float = LIMIT_S) -> Life:
        """Wait for its end; what takes longer hangs, and is killed and marked."""
        if not self.wait(seconds):
            self.hung = True
            self.kill()
        return self

    def kill(self, ranks: Sequence[int] = ()) -> None:
        """SIGKILL for these ranks, or all; not for their children, which have to notice."""
        for rank, pid in enumerate(self.pids):
            if pid not in self.codes and (not ranks or rank in ranks):
                os.kill(pid, signal.SIGKILL)
        self.wait(LIMIT_S if ranks else 60)
        if ranks and not self.ended():
            self.hung = True
            self.kill()


def start(
    main: Callable[[list[str]], int],
    arguments: Sequence[str],
    output: Path,
    *,
    ranks: int = 1,
    environment: Sequence[dict[str, str]] = ({},),
) -> Life:
    """Start `main` in processes of their own. `environment`: what is added, for each rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    port = str(20_000 + (os.getpid() * 7 + int(time.monotonic() * 50)) % 12_000)
    pids = []
    for rank in range(ranks):
        added = dict(environment[rank % len(environment)])
        if ranks > 1:
            added |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            added |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            added |= {"MASTER_PORT": port}
        pid = os.fork()
        if not pid:
            _live(main, list(arguments), output, added)
        pids.append(pid)
    return Life(pids, output)


def _live(
    main: Callable[[list[str]], int], arguments: list[str], output: Path, added: dict[str, str]
) -> None:
    """The child: from the start of the program to its end, as the interpreter would do it."""
    code = 1
    try:
        os.setsid()  # its processes are found by their session
        os.environ.update(added)
        name_semaphores()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(file, stream)
        if hasattr(disk := ctypes.CDLL(None), "disk_begin"):
            disk.disk_begin()
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def name_semaphores() -> None:
    """Let this process, and all that it starts by multiprocessing, name them after the campaign."""
    multiprocessing.current_process()._config["semprefix"] = f"/{Path(os.environ[PLACE]).name}"  # type: ignore[attr-defined]


def left_processes(sessions: set[int], patience_s: float = 30.0) -> list[str]:
    """What still lives of these sessions after a while; readers look for their parent in turns."""
    limit = time.monotonic() + patience_s
    while True:
        alive = [name for session, name in _sessions() if session in sessions]
        if not alive or time.monotonic() > limit:
            return alive
        time.sleep(0.1)


def _sessions() -> list[tuple[int, str]]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if state not in "ZX":
            found.append((int(session), name + ")"))
    return found


def shared_memory() -> set[str]:
    """Names in shared memory that no process has mapped: what was left there.

    Of semaphores only those of this campaign: other tests beside it kill processes as well.
    """
    names = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    if not names:
        return names
    mapped = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped.append(maps.read_text())
        except OSError:
            continue
    text = "\n".join(mapped)
    made = f"sem.{Path(os.environ[PLACE]).name}-"
    ours = {name for name in names if not name.startswith("sem.") or name.startswith(made)}
    return {name for name in ours if f"/dev/shm/{name}" not in text}


def settled(before: set[str], patience_s: float = 60.0) -> set[str]:
    """What is left in shared memory beyond `before`, after a while.

    Others on this machine have names there too; and after a kill a process that has to be
    scheduled first cleans up.
    """
    limit = time.monotonic() + patience_s
    while (left := shared_memory() - before) and time.monotonic() < limit:
        time.sleep(0.5)
    return left


def forget(folder: Path) -> None:
    """Delete a run directory: a campaign makes many."""
    shutil.rmtree(folder, ignore_errors=True)


def parser(description: str | None, number: str, default: int) -> argparse.ArgumentParser:
    """The command line of a campaign; `number`: the option that says how many."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(number, type=int, default=default, help="how many, at least")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", type=int, default=-1, help="number of one to repeat")
    made.add_argument("--keep", action="store_true", help="print what a failed one has printed")
    return made


def show(output: Path) -> None:
    """The last lines of what a run has printed."""
    print(output.read_text(errors="replace")[-6000:])
