"""A pool of gloo ranks that all distributed tests share: processes start once per session."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastmoco.machine.ranks import World


def _serve(rank: int, size: int, store: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(rank, rank, size, torch.device("cpu"), "gloo")
    while (task := _next(tasks)) is not None:
        function, arguments = task
        try:
            results.put((rank, function(world, *arguments), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def _next(tasks: Any) -> Any:
    """The next task; None once the session that started this process is gone."""
    parent = mp.parent_process()
    while parent is None or parent.is_alive():
        try:
            return tasks.get(timeout=5)
        except queue.Empty:
            continue
    return None


def forking_context() -> Any:
    """Starts processes as forks of a server that has imported torch once for all of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "torch.distributed"])
    return context


class Ranks:
    """`size` processes in one gloo group; `run` calls a module-level function on each of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = forking_context()
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(
                target=_serve, args=(r, size, store, self._tasks[r], self._results), daemon=True
            )
            for r in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(world, *arguments)` on every rank; results in rank order."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        answers = [self._answer() for _ in range(self.size)]
        failed = [trace for _, _, trace in answers if trace]
        assert not failed, failed[0]
        return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]

    def _answer(self) -> Any:
        """The next answer of any rank; however long it takes, while all of them live."""
        while True:
            try:
                return self._results.get(timeout=5)
            except queue.Empty:
                dead = [p.exitcode for p in self._processes if not p.is_alive()]
                assert not dead, f"{len(dead)} of {self.size} ranks died, with exit codes {dead}"

    def close(self) -> None:
        """End the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=30)
        self._folder.cleanup()
