"""The one loop that detectors and segmenters are trained by.

Every random choice is a function of the step, so a run that was killed goes on from its checkpoint
as if nothing had happened: bit for bit on the CPU, and on a GPU as far as the backward of cuDNN and
of region pooling is deterministic there.

n local batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import ConfigError
from fastmoco.machine import collectives, durable, owner
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import StopRequest
from fastmoco.method.agreement import on_every_rank
from fastmoco.run.logbook import Logbook
from fastmoco.run.metrics import Clock
from fastmoco.run.record import Record
from fastmoco.transfer.samples import Deliveries, Prepared, Sample, batches
from fastmoco.transfer.schedule import Schedule
from fastmoco.weights import files

CHECKPOINT = "checkpoint.pth.tar"
"""Name of the file in the folder of a run that it goes on from."""
TESTED = "tested.json"
"""What the last test in a folder of results was of."""
TEST = "test"
"""Kind of the records that hold the scores of the test pictures."""

Evaluate = Callable[[], dict[str, float]]


class DivergedError(RuntimeError):
    """The loss is no longer a number. The message is one sentence for the user."""


class Training:
    """SGD on a model that computes its losses; resumable from any step.

    model: called with what `inputs` makes of this rank's samples, gives losses by name whose means
    over ranks are to be added up. `kept` is the part of it that checkpoints hold.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: nn.Module,
        samples: Prepared,
        count: int,
        inputs: Callable[[list[Sample]], tuple[Any, ...]],
        given: argparse.Namespace,
        world: World,
        identity: list[object],
        tested: list[object],
    ) -> None:
        """count: number of samples. identity: what decides the result besides the schedule.
        tested: what else decides the scores.

        Raises `ConfigError` for a schedule that cannot train, and as `resume` does.
        """
        self.schedule = Schedule.of(given)
        if self.schedule.batch_size % world.size:
            raise ConfigError(
                f"--batch_size {self.schedule.batch_size} cannot be split over {world.size} ranks."
            )
        self.world, self.out = world, Path(given.out)
        self.samples, self.inputs = samples, inputs
        self.save_every, self.test_every = given.save_every, given.test_every
        self.log_every, self.workers = given.log_every, given.workers
        self.deliveries = Deliveries(count, self.schedule.batch_size, given.seed)
        self.model, self.kept = model.to(world.device), kept
        model.to(memory_format=torch.channels_last)
        self.precision = choose_precision(given.precision, world.device)
        half = self.precision.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=half)
        self.optimizer = self.schedule.optimizer(model)
        whole = [vars(self.schedule), given.seed, count, self.precision.name, *identity]
        text = json.dumps(whole, sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.tested = json.dumps([given.root, given.test, *tested], default=str)
        self.done = 0
        on_every_rank(self._resume, world)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which the model runs in the precision of the run."""
        on = self.precision.dtype != torch.float32
        return torch.autocast(self.world.device.type, self.precision.dtype, enabled=on)

    def step(self, samples: list[Sample], number: int) -> dict[str, Tensor]:
        """Step `number`, from 0, on this rank's samples; its losses, of this rank.

        Raises `ConfigError`, on every rank, where a sample of any is none.
        """
        broken = next((one for one in samples if isinstance(one, str)), "")
        if collectives.any_rank(bool(broken), self.world):
            told = collectives.gather_objects(broken, self.world)
            raise ConfigError(next(text for text in told if text))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(number)
        self.model.train()
        with self.autocast():
            losses: dict[str, Tensor] = self.model(*self.inputs(samples))
        self.optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        backward(self.scaler.scale(total), self.model, self.world)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def run(self, request: StopRequest, evaluate: Evaluate) -> dict[str, float]:
        """Train what is left, and test; the last scores, or nothing where a signal came before."""
        main, total = self.world.is_main, self.schedule.iterations
        with (
            collectives.naming_failures(self.world, lambda: self.done),
            owner.Owner(self.out, enabled=main),
            Logbook(self.out, enabled=main, done=self.done, total=total) as log,
        ):
            log.say(f"{self.precision}; {self._standing()}; results in {self.out}")
            request.patient = True
            stopped = self._loop(request, evaluate, log)
            request.patient = False
            if stopped:
                log.say(f"stopped by a signal at step {self.done}, the same command resumes")
                return {}
            return self._test(evaluate, log)

    def _standing(self) -> str:
        told = f"{self.schedule.iterations} steps of {self.schedule.batch_size} pictures"
        return f"{told}, {self.done} are done" if self.done else told

    def _loop(self, request: StopRequest, evaluate: Evaluate, log: Logbook) -> bool:
        """Whether a signal stopped it."""
        shared, total = collectives.SharedRequest(self.world), self.schedule.iterations
        if self.done == total:
            return False
        delivered = batches(
            self.samples,
            self.deliveries,
            range(self.done, total),
            rank=self.world.rank,
            size=self.world.size,
            workers=self.workers,
        )
        window = Window(self, log)
        for number in range(self.done, total):
            began = time.perf_counter()
            samples = next(delivered)
            waited = time.perf_counter() - began
            window.add(self.step(samples, number), waited)
            self.done = done = number + 1
            stop = shared.poll(int(request.asked())) > 0
            save = done % self.save_every == 0
            if stop or save or done % self.log_every == 0 or done == total:
                window.flush(done)
            if stop or save or done == total:
                self._save(log, last=stop or done == total)
            if stop:
                break
            if done < total and self.test_every and done % self.test_every == 0:
                request.patient = False  # the state is saved or will come again
                self._test(evaluate, log)
                request.patient = True
                window.restart()
        shared.settle()
        return stop

    def _test(self, evaluate: Evaluate, log: Logbook) -> dict[str, float]:
        """Scores of the test pictures; told again where these are known."""
        known = [r for r in log.kept(TEST) if r.step == self.done] if self._same_test() else []
        known = collectives.gather_objects(known, self.world)[0]
        if known:
            return dict(known[-1].values)
        scores = evaluate()
        each = [name for name in scores if "/" not in name or name.startswith("VOC")]
        told = "  ".join(f"{name} {scores[name]:.2f}" for name in each)
        epoch = self.done * self.schedule.batch_size / self.deliveries.samples
        log.record(Record(TEST, scores, self.done, epoch), f"step {self.done}  {told}")
        if self.world.is_main:
            durable.replace(self.out / TESTED, lambda partial: partial.write_text(self.tested))
        return scores

    def _same_test(self) -> bool:
        """Whether the last scores in `out` are of the test pictures and options of this command."""
        try:
            return (self.out / TESTED).read_text() == self.tested
        except (OSError, ValueError):
            return False

    def _save(self, log: Logbook, *, last: bool) -> None:
        """Raises `ConfigError`, on every rank, where the last state cannot be written."""
        try:
            on_every_rank(self._write if self.world.is_main else lambda: None, self.world)
        except ConfigError as error:
            if last:
                raise
            log.warn(f"{error} The run goes on, and tries again after {self.save_every} steps.")

    def _write(self) -> None:
        content = {
            "identity": self.identity,
            "step": self.done,
            "model": self.kept.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        files.write_torch(self.out / CHECKPOINT, content)

    def _resume(self) -> None:
        """Raises `ConfigError` where `out` holds another run, or cannot be read."""
        path = self.out / CHECKPOINT
        if not path.is_file():
            return
        content = files.load(path)
        if content.get("identity") != self.identity:
            raise ConfigError(
                f"{path} is of another trunk, data set, schedule or precision: choose another "
                "--out, or give the command that began it."
            )
        self.kept.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.done = int(content["step"])


def backward(loss: Tensor, model: nn.Module, world: World) -> None:
    """Gradients of the mean of `loss` over ranks, in every parameter.

    `DistributedDataParallel`, which would average during the backward, refuses synchronized batch
    norm on CPUs; here averaging is 132 MB for R50-C4, little beside a step of detection.
    """
    loss.backward()
    if world.size > 1:
        for parameter in model.parameters():
            if parameter.grad is None:  # other ranks may have one
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        collectives.all_reduce_mean_(gradients, world)


class Window:
    """The steps since the last line of the log: sums on the device, and times."""

    def __init__(self, training: Training, log: Logbook) -> None:
        self._training, self._log = training, log
        self._clock = Clock(training.world.device)
        self.restart()

    def restart(self) -> None:
        """Begin a window now."""
        self._sums: dict[str, Tensor] = {}
        self._count, self._waited = 0, 0.0
        self._clock.restart()

    def add(self, losses: dict[str, Tensor], waited_s: float) -> None:
        """Count one step, without waiting for the device."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(loss)) + loss
        self._count, self._waited = self._count + 1, self._waited + waited_s
        self._clock.mark()
        self._log.advance()

    def flush(self, done: int) -> None:
        """Write the means down. Raises `DivergedError` for a loss that is not finite."""
        if not self._count:
            return
        one, world = self._training, self._training.world
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name].double() for name in names]) / self._count
        collectives.all_reduce_mean_([sums], world)
        means = dict(zip(names, sums.tolist(), strict=True))
        window, lr = self._clock.window(), one.schedule.rate(done - 1)
        batch, total = one.schedule.batch_size, one.schedule.iterations
        values = {
            "loss": sum(means.values()),
            **means,
            "lr": lr,
            "images_per_second": window.steps * batch / window.seconds,
            "data_wait_percent": 100 * self._waited / window.seconds,
        }
        eta = int((total - done) * window.seconds / window.steps)
        parts = "  ".join(f"{name.removeprefix('loss_')} {means[name]:.3f}" for name in names)
        line = (
            f"step {done}/{total}  loss {values['loss']:.3f} ({parts})  lr {lr:.4g}  "
            f"{values['images_per_second']:.1f} pictures/s  "
            f"wait {values['data_wait_percent']:.1f} %  "
            f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
        )
        epoch = done * batch / one.deliveries.samples
        self._log.record(Record("train", values, done, epoch), line)
        if not math.isfinite(values["loss"]):
            raise DivergedError(
                f"The loss became {values['loss']} before step {done}: lower --lr or lengthen "
                f"--warmup; the last good state is in {one.out}."
            )
        self.restart()
