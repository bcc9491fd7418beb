"""Pre-train an encoder with Momentum Contrast: `torchrun -m fastmoco.train --config FILE`.

Build everything once, run the loop, close. The algorithm: `fastmoco.method.step.Step`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastmoco.config import Config, ConfigError, check, parse
from fastmoco.data.preview.draw import draw_views
from fastmoco.evaluate.monitor import KnnMonitor
from fastmoco.machine import collectives, host, ranks
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import INTERRUPTED, StopRequest
from fastmoco.machine.watchdog import Watchdog
from fastmoco.method import agreement
from fastmoco.method.build import build_step, compile_encoders
from fastmoco.method.memory_bank import allocate_bank
from fastmoco.method.moco import build_moco
from fastmoco.method.optim.update import lr_at, set_lr
from fastmoco.run import directory, resuming
from fastmoco.run.checkpoint import Saver
from fastmoco.run.choices import start_lines, start_warnings
from fastmoco.run.logbook import Logbook
from fastmoco.run.progress import DivergedError, Progress, sum_up
from fastmoco.run.tracker import tracked
from fastmoco.weights.export import export_trunk
from fastmoco.weights.initialize import start_from

if TYPE_CHECKING:
    from fastmoco.api import Trained

# Errors whose message is one sentence for the user.
SENTENCES = (
    *(ConfigError, DivergedError, agreement.DisagreementError, collectives.CollectiveError),
    OSError,  # a disk that is full or gone
)


class Run:
    """One training run on this rank: built once, trained once."""

    def __init__(self, config: Config, world: World, request: StopRequest | None = None) -> None:
        check(config, world.size)
        config, source = agreement.on_every_rank(partial(directory.resolved, config), world)
        self.config, self.world, self.folder = config, world, Path(config.run.dir)
        if world.is_main:
            directory.check_run_directory(config)
        self.lines = [host.settle(world.device)]  # before anything large is allocated
        wrong = agreement.agree_on_kernels(world) if world.device.type == "cuda" else []
        found = resuming.find(config, world)
        self.monitor = KnnMonitor(config, world) if config.knn.every else None
        moco = build_moco(config, config.bn_group_size(world.size), world.device)
        fresh = config.model.init_from and not found
        self.lines += [start_from(config, moco)] if fresh else []
        compiled = compile_encoders(config, world.device)
        self.step = build_step(config, moco, world, compile_encoders=compiled)
        agreement.require_one_precision(self.step.precision, world)
        self.loader = agreement.agreed_loader(config, source, world, self.step.shuffle.key_rows)
        images = resuming.require_same_data(found, self.loader, config)
        allocate_bank(config, moco, self.loader.num_samples)  # before a checkpoint fills it
        self.per_epoch = self.loader.steps_per_epoch
        resumed = resuming.resume(found, self.step, config, self.per_epoch, world)
        self.done = resumed.step
        total = self.per_epoch * config.optim.epochs
        self.stop_at = max(self.done, min(total, config.run.max_steps or total))
        self.request, self.shared = request or StopRequest(), collectives.SharedRequest(world)
        self.stopping = self.finished = False  # on every rank in the same step
        self.saver = Saver(self.step, config, world, self.per_epoch, self.loader.fingerprint)
        self.lines += start_lines(config, world, loader=self.loader, done=self.done)
        told = [*resumed.notes, *images, *start_warnings(config, world, self.loader)]
        self.warnings = wrong + agreement.sentences_of_all(told, world)

    def train(self) -> None:
        """Run to the last step or to a signal; either way the final state is on disk."""
        main, self.request.patient = self.world.is_main, True
        with (
            collectives.naming_failures(self.world, lambda: self.done),
            Watchdog(self.world, lambda: self.done),
            directory.claimed(self.config, main),
            self.saver,  # what it writes is waited for while the folder is ours
            self.loader,
            Logbook(self.folder, enabled=main, done=self.done, total=self.stop_at) as log,
            tracked(self.config, log.warn, lambda: self.finished, enabled=main) as log.send,
        ):
            for line in self.lines:
                log.say(line)
            for sentence in self.warnings:
                log.warn(sentence)
            if main and self.done == 0 and self.config.data.source != "synthetic":
                draw_views(self.config, self.folder / "views.png")
            self._loop(log)
            if main:
                sum_up(self.folder, log)
            self.finished = self.done == self.stop_at
            if self.finished:
                with collectives.averaged(self.step.moco.running_statistics(), self.world):
                    epochs, data = self.done // self.per_epoch, self.config.data
                    log.say(export_trunk(self.step.moco, self.folder, epochs, data) if main else "")
            end = "done" if self.finished else "stopped by a signal, the same command resumes"
            log.say(f"{end}: step {self.done}; checkpoints, metrics and pictures in {self.folder}")

    def _loop(self, log: Logbook) -> None:
        step, accumulate = self.step, self.config.optim.accumulate
        start, stop = self.done, self.stop_at
        progress = Progress(
            self.config, self.world, log, step.moco.queue, range(start, stop), self.per_epoch
        )
        if self.monitor and start == 0:
            raw, untrained = self.monitor.raw_pixels(), self.monitor.trained(step.moco)
            progress.baseline(raw, untrained, self.monitor.chance)
        elif start:
            self._evaluate(progress, log)
        batches = self.loader.batches(start, stop)
        progress.restart()
        for number in range(start, stop):
            lr = lr_at(self.config, number / self.per_epoch)
            set_lr(step.optimizer, lr)
            progress.add(step(list(islice(batches, accumulate)), number))
            self.done = done = number + 1
            asked = self.shared.poll(2 if self.request.asked() else int(self.saver.overdue()))
            self.stopping = asked == 2
            if progress.due(done) or asked:
                progress.flush(done, lr, self.loader)  # the one host synchronization
                agreement.require_agreement(step.moco, self.world, done)
                end = self.stopping or done == stop
                if warning := self.saver.save_if_due(done, overdue=asked == 1, end=end):
                    log.warn(warning)
                self._evaluate(progress, log)
                progress.draw_report(done, now=bool(asked))
                if self.stopping:
                    break
                progress.restart()
        self.shared.settle()

    def _evaluate(self, progress: Progress, log: Logbook) -> None:
        """kNN where it is due and was not yet done, as when the run ended right after saving."""
        due = self.monitor and self.monitor.due(self.done, self.per_epoch, self.stop_at)
        missing = due and collectives.any_rank(log.lacks("knn", self.done), self.world)
        if self.monitor and missing and not self.stopping:
            progress.knn(self.done, self.monitor.trained(self.step.moco))


def join_world(config: Config) -> World:
    """This rank among all. Raises `ConfigError` for a device that is not there."""
    try:
        return ranks.start(config.run.device, config.run.timeout_s)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when trained, 2 for bad input, 1 if it failed; stopped 75 (`REQUEUE`) or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = os.environ.get("RANK", "0") == "0"
    try:
        if first and not arguments:
            print("no arguments: training the demo recipe, configs/demo.yaml", flush=True)
        with StopRequest() as request, collectives.naming_failures():
            config = parse(arguments)
            run = Run(config, join_world(config), request)
            run.train()
            return 0 if run.finished else request.code
    except SENTENCES as error:
        if first or isinstance(error, agreement.ALONE):
            print(f"fastmoco: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED  # asked twice, or before there was anything to save
    finally:
        ranks.stop()


class _Callable(ModuleType):
    """`fastmoco.train(config)`: whoever imports this module binds its name in the package."""

    def __call__(self, config: Config) -> Trained:
        from fastmoco.api import train

        return train(config)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
