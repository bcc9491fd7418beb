"""What the campaigns share: pictures, an undisturbed run, and the verdict on a disturbed one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fastmoco.train import main as train
from tests.campaigns import runs
from tests.campaigns.verdict import UNTRUE, differences, end_of, traced


class Campaign:
    """Runs of one command, each in a folder of its own."""

    def __init__(self, place: Path, ranks: int = 1) -> None:
        self.place, self.ranks = place, ranks
        self.options = [*runs.SMALL, *runs.pictures(place / "images")]
        life, log = self.recorded("whole")
        if set(life.codes.values()) != {0}:
            sys.exit(f"an undisturbed run fails:\n{life.text[-3000:]}")
        self.whole = end_of(place / "whole")
        self.cached = self.cache()
        self.memory = runs.shared_memory()
        self.operations = _count(log)

    def duration(self) -> float:
        """Seconds of an undisturbed run. The first one may have compiled kernels."""
        began = time.monotonic()
        self.start("timed").finish()
        return time.monotonic() - began

    def cache(self) -> set[str]:
        """Names of the files in the cache."""
        cache = self.place / "cache"
        return {str(path.relative_to(cache)) for path in cache.rglob("*")}

    def start(self, name: str, disk: dict[str, str] | None = None) -> runs.Life:
        """A life of the run with this name. `disk`: variables of `disk_faults.c`, for rank 0."""
        root = {"DISK_ROOT": str(self.place / name)}
        return runs.start(
            train,
            [*self.options, f"--run.dir={self.place / name}"],
            self.place / f"{name}.txt",
            ranks=self.ranks,
            environment=(root | (disk or {}), {}),
        )

    def recorded(self, name: str) -> tuple[runs.Life, Path]:
        """An undisturbed life, and the record of its operations; of rank 0, which writes files."""
        log = self.place / f"{name}.operations"
        for old in (log, log.with_name(f"{log.name}.data")):
            old.unlink(missing_ok=True)
        return self.start(name, {"DISK_LOG": str(log)}).finish(), log

    def begin_half(self, name: str) -> None:
        """A run that is killed half-way: a folder with checkpoints to go on from."""
        fault = f"{runs.OPERATIONS['rename']} {self.operations['rename'] // 2} 1 5 kill"
        self.start(name, {"DISK_FAULT": fault}).finish()

    def last_life(self, name: str) -> tuple[list[str], set[int]]:
        """The command once more, undisturbed: what is wrong about its end; and its sessions."""
        life = self.start(name).finish()
        wrong = ["hangs"] * life.hung
        if set(life.codes.values()) != {0}:
            last = life.text.strip().splitlines()[-1:]
            wrong.append(f"ends with codes {sorted(life.codes.values())}: {last}")
        return wrong, set(life.pids)

    def verdict(self, name: str, sessions: set[int]) -> list[str]:
        """In which ways a run that has ended is not as an undisturbed one, and what it has left."""
        text = (self.place / f"{name}.txt").read_text(errors="replace")
        wrong = traced(text) + ["a false warning about metrics.jsonl"] * (UNTRUE in text)
        wrong += differences(self.place / name, self.whole)
        return wrong + self.leavings(sessions)

    def leavings(self, sessions: set[int]) -> list[str]:
        """Processes, shared memory and files of the cache that runs have left."""
        wrong = []
        if alive := runs.left_processes(sessions):
            wrong.append(f"left processes: {alive}")
        if memory := runs.settled(self.memory):
            wrong.append(f"left in shared memory: {sorted(memory)}")
        if files := self.cache() ^ self.cached:
            wrong.append(f"left in the cache: {sorted(files)}")
        return wrong

    def forget(self, name: str) -> None:
        """Delete what a run has left on purpose: a campaign makes many."""
        runs.forget(self.place / name)


def _count(log: Path) -> dict[str, int]:
    """Operations of each kind in a record."""
    kinds = {"create": "open", "truncate": "open", "write": "write", "fsync": "fsync"}
    names = [kinds.get(line.split("\t")[0], "rename") for line in log.read_text().splitlines()]
    return {name: names.count(name) for name in runs.OPERATIONS}
