"""From the steps of the loop to what its user sees: flushes, alarms, records."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.data.loader import Loader
from fastmoco.data.preview import replay
from fastmoco.machine.gpu_meter import Sample, build_meter
from fastmoco.machine.host import load_average, machine_cores
from fastmoco.machine.ranks import World
from fastmoco.method.step import StepResult
from fastmoco.run.alarms import Watch
from fastmoco.run.curves import draw_curves
from fastmoco.run.logbook import Logbook, train_line
from fastmoco.run.metrics import Clock, Metrics, QueueChange, Trouble, peak_memory_gib
from fastmoco.run.page.html_report import NAME, write_report
from fastmoco.run.record import METRICS, WARMUP_STEPS, Record, knn_summary, read_metrics

# A demo that takes longer than this has gone wrong, and its user should not wait to find out.
LONG_DEMO_S = 30 * 60


# Bad steps one after another that end a run although each of them could be left out: nothing is
# learned any more, and the weights themselves may be at fault.
IN_A_ROW = 20


class DivergedError(RuntimeError):
    """Loss or gradients are no longer finite. The message is one sentence for the user."""


class Progress:
    """Counts steps on the device and turns them into log lines at each flush.

    `add` never waits for the device; `flush` does, once.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        log: Logbook,
        queue: Tensor,
        steps: range,
        per_epoch: int,
    ) -> None:
        self._config = config
        self._world = world
        self._log = log
        self._stop = steps.stop
        self._per_epoch = per_epoch
        self._warm = steps.start + WARMUP_STEPS
        self._estimate_at = self._warm + WARMUP_STEPS
        self._metrics = Metrics(world, config.model.dim)
        views = 2 if config.moco.symmetric else 1
        keys_per_step = views * config.optim.global_batch_size
        self._queue_change = QueueChange(queue, keys_per_step, steps.start)
        self._watch, self._told = Watch(config), set[str]()
        for record in _earlier(Path(config.run.dir) / METRICS, steps.start):
            self._watch.see(record)
        self._clock = Clock(world.device)
        self._waited = 0.0
        self._meter = build_meter(world.device, log.warn)

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self._metrics.add(result)
        self._clock.mark()
        self._log.advance()

    def due(self, done: int) -> bool:
        """Whether to flush after `done` steps: regularly, after the warm-up, at epoch ends."""
        regular = done % self._config.run.log_every == 0 or done % self._per_epoch == 0
        return regular or done in (self._warm, self._estimate_at, self._stop)

    def flush(self, done: int, lr: float, loader: Loader) -> None:
        """Write down the window since the last flush; the host synchronization of the loop.

        What `loader` knows of bad samples all ranks learn here. Raises `DivergedError` if a loss or
        gradient was not finite and `run.nonfinite` does not leave out its step, and `ConfigError`
        for too many bad samples.
        """
        values = self._metrics.flush()
        bad, waited_s = loader.bad_samples, loader.wait_s
        replaced = bad.exchange(self._world)
        window = self._clock.window()
        batch = self._config.optim.global_batch_size
        values |= {
            "loss_random": math.log(1 + self._config.negatives()),
            "lr": lr,
            "images_per_second": window.steps * batch / window.seconds,
            "step_ms_p50": window.step_ms_p50,
            "cpu_ms_per_step": 1e3 * window.cpu_seconds / window.steps,
            "data_wait_percent": 100 * (waited_s - self._waited) / window.seconds,
            "bad_samples": len(bad.reasons),
        }
        values |= self._read_gpu()
        if (memory := peak_memory_gib(self._world.device)) is not None:
            values["peak_memory_gib"] = memory
        values |= self._queue_change.measure(done)
        self._waited = waited_s
        record = Record("train", values, done, done / self._per_epoch, done <= self._warm)
        eta = (self._stop - done) * window.seconds / window.steps
        epochs = self._config.optim.epochs
        self._write(record, train_line(record, self._per_epoch * epochs, epochs, eta))
        if self._metrics.trouble.steps:
            self._tell_trouble(self._metrics.trouble, done, loader)
        if self._warm < done <= self._estimate_at:
            self._estimate(done, eta, values["data_wait_percent"])
        if replaced:
            self._log.warn(replaced)

    def _tell_trouble(self, trouble: Trouble, done: int, loader: Loader) -> None:
        """Save what the first of the bad steps had for data, and warn of it or end the run."""
        first, folder = done - trouble.since + 1, Path(self._config.run.dir)
        told = f"The loss or its gradient is not finite in step {first}"
        if trouble.steps > 1:
            told += f" and in {trouble.steps - 1} more until step {done}"
        name = replay.save(folder, self._config, loader, first, write=self._world.is_main)
        draw = f"fastmoco preview --replay {name} draws its batch"
        if self._config.run.nonfinite == "stop":
            raise DivergedError(
                f"{told}: {draw}; lower optim.lr, train in bf16 instead of fp16, or leave out such "
                "steps by --run.nonfinite skip; the same command goes on from the last good "
                f"checkpoint in {folder}."
            )
        if trouble.in_a_row >= IN_A_ROW:
            raise DivergedError(
                f"{told}, the last {trouble.in_a_row} of them in a row, so that it is no help to "
                f"leave them out: {draw}; lower optim.lr; the last good checkpoint is in {folder}."
            )
        self._log.warn(f"{told}: left out, as run.nonfinite says; {draw}.")

    def _read_gpu(self) -> Sample:
        """Readings of this rank's GPU; nothing from the moment on in which it cannot be read."""
        try:
            return self._meter() if self._meter else {}
        except Exception:  # NVML reports every absence by an exception class of its own
            self._meter = None
            return {}

    def draw_report(self, done: int, *, now: bool = False) -> None:
        """Renew the page about the run where a checkpoint is due after `done` steps, or `now`.

        What fails there is a warning, never the end of a run.
        """
        every = self._per_epoch * self._config.run.checkpoint_every
        due = now or done % every == 0 or done == self._stop
        if not due or not self._world.is_main:
            return
        folder = Path(self._config.run.dir)
        try:
            write_report([folder], folder / NAME)
        except Exception as error:
            self._log.warn(f"{NAME} was not renewed ({type(error).__name__}: {error}).")

    def _write(self, record: Record, text: str) -> None:
        """Keep a record, and tell of each kind of alarm when it shows for the first time."""
        self._log.record(record, text)
        for alarm in self._watch.see(record):
            if alarm.kind not in self._told:
                self._told.add(alarm.kind)
                self._log.warn(alarm.sentence)

    def _estimate(self, done: int, seconds: float, wait_percent: float) -> None:
        """Say how long the rest will take, while there is still something to change."""
        self._estimate_at = 0  # once
        steps = self._stop - done
        if not steps:
            return
        self._log.say(f"duration  about {in_words(seconds)} for the {steps} steps that are left")
        if self._config.data.source == "demo" and seconds > LONG_DEMO_S:
            self._log.warn(why_so_long(seconds, wait_percent, load_average(), machine_cores()))

    def restart(self) -> None:
        """Begin the next window now, so that kNN and checkpoints do not count as training."""
        self._clock.restart()

    def knn(self, done: int, accuracy: float) -> None:
        """Record the kNN accuracy of the trunk after `done` steps."""
        record = Record("knn", {"knn_top1": accuracy}, done, done / self._per_epoch)
        self._write(record, f"kNN top-1 {100 * accuracy:.1f} % after epoch {record.epoch:.2f}")

    def baseline(self, raw_pixel: float | None, untrained: float, chance: float) -> None:
        """Record the kNN accuracies that training has to beat."""
        marks = {"untrained": untrained, "chance": chance}
        if raw_pixel is not None:
            marks["raw_pixel"] = raw_pixel
        pixels = "not computed" if raw_pixel is None else f"{100 * raw_pixel:.1f} %"
        self._write(
            Record("knn_baseline", marks),
            f"kNN top-1 before training: raw pixels {pixels}, untrained encoder "
            f"{100 * untrained:.1f} %, chance {100 * chance:.1f} %",
        )


def _earlier(metrics_jsonl: Path, start: int) -> list[Record]:
    """What was recorded up to step `start`, where a resumed run goes on."""
    try:
        return [r for r in read_metrics(metrics_jsonl) if r.step <= start] if start else []
    except ConfigError:  # there is no run here yet: it was resumed from another folder
        return []


def in_words(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3 h 05 min`, `2 days 4 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if days else f"{hours} h {minutes:02d} min"


def why_so_long(seconds: float, wait_percent: float, load: float | None, cores: int) -> str:
    """Why a demo takes so long and what would make it shorter, in one sentence.

    `load` is the average number of runnable processes of the last minute, this run's threads
    included; None where the system does not say.
    """
    if wait_percent > 50:
        reason = f"{wait_percent:.0f} % of the time the step waits for images"
    elif load is not None and load > 2 * cores:
        reason = f"other processes want the {cores} cores too (load average {load:.0f})"
    else:
        reason = f"the step is slow on the {cores} core{'s' * (cores > 1)} that it may use"
    return (
        f"The demo will take about {in_words(seconds)} instead of five minutes, because {reason}: "
        "stop it and run it on an idle or faster machine, or shorten it with --optim.epochs 4."
    )


def sum_up(folder: Path, log: Logbook) -> None:
    """At the end of a run: draw its curves and say what kNN found.

    What fails is a warning: the encoder does not depend on it.
    """
    try:
        draw_curves(folder / METRICS, folder / "curves.png")
        log.say(knn_summary(folder / METRICS))
    except (ConfigError, OSError) as error:
        log.warn(f"curves.png was not drawn: {error}")
