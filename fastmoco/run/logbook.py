"""The record of a run: metrics.jsonl, TensorBoard with the same names, and the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
    RecordWriter,
)
from tqdm import tqdm

from fastmoco.machine import durable
from fastmoco.run.record import METRICS, Record, read_records
from fastmoco.weights import files


class Logbook:
    """Writes on the main rank and is silent on the others.

    `metrics.jsonl` is the record: one JSON object per line, appended at once, so that a killed run
    keeps all it had. Records past `done`, where the run goes on, are dropped on opening: those
    steps are about to be done again. What cannot be written now is kept and written later. A
    progress bar appears only where standard error is a terminal.
    """

    def __init__(self, folder: Path, *, enabled: bool, done: int, total: int) -> None:
        self._enabled = enabled
        self.send: Callable[[Record], None] | None = None
        """Where records go besides the run directory, see `tracker.tracked`."""
        if not enabled:
            return
        self._path = folder / METRICS
        self._kept = kept = _records_until(self._path, done)
        self._written = {(record.kind, record.step) for record in kept}
        self._unwritten: list[Record] = []
        # A life may have ended after writing one record of its last step, on the board or not.
        self._board, self._not_on_board = Board(folder, done), [r for r in kept if r.step == done]
        self._failing = False
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._write()
            self._bar.close()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._enabled:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            with contextlib.suppress(OSError):  # the terminal is gone: train on
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a sentence that somebody should act on."""
        self.say(f"WARNING: {text}")

    def lacks(self, kind: str, step: int) -> bool:
        """Whether the record of this kind at this step is still to be written; False elsewhere."""
        return self._enabled and (kind, step) not in self._written

    def kept(self, kind: str) -> list[Record]:
        """The records of this kind that were there on opening; none on other ranks."""
        return [record for record in self._kept if record.kind == kind] if self._enabled else []

    def record(self, record: Record, text: str) -> None:
        """Append one record to metrics.jsonl and its numbers to TensorBoard; `text` says it."""
        if not self._enabled:
            return
        self.say(text)
        if self.send is not None:
            self.send(record)
        self._written.add((record.kind, record.step))
        self._unwritten.append(record)
        self._not_on_board.append(record)
        self._write()

    def _write(self) -> None:
        try:
            if self._unwritten:
                text = "".join(one.line() + "\n" for one in self._unwritten)
                files.append(self._path, text.encode())
                self._unwritten = []
            if self._not_on_board:
                self._board.add(self._not_on_board)
                self._not_on_board = []
        except OSError as error:
            if not self._failing:
                self.warn(f"{self._path} cannot be written ({error}): it is tried again later.")
            self._failing = True
        else:
            self._failing = False


class Board:
    """The records as one file of TensorBoard's events, made with the first of them.

    TensorBoard drops what earlier files of the folder have from step `done` on. `SummaryWriter`
    writes in a thread of its own, which ends with a traceback where the disk fails.
    """

    def __init__(self, folder: Path, done: int) -> None:
        # TensorBoard reads files in the order of their names.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._path, self._done = folder / f"events.out.tfevents.{name}", done

    def add(self, records: Sequence[Record]) -> None:
        """All of them are on the disk when this returns. Raises `OSError`; none is there then."""
        now, events = time.time(), list[Event]()
        if not self._path.exists() or not self._path.stat().st_size:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            events.append(Event(wall_time=now, step=self._done, session_log=start))
        for record in records:
            values = [Summary.Value(tag=n, simple_value=v) for n, v in record.values.items()]
            summary = Summary(value=values)
            events.append(Event(wall_time=now, step=record.step, summary=summary))
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        files.append(self._path, content.getvalue())


def _records_until(path: Path, done: int) -> list[Record]:
    """Leave in the file only whole records of at most `done` steps, none where it is 0."""
    if not path.exists():
        return []
    records = read_records(path)
    kept = [record for record in records if done and record.step <= done]
    text = "".join(record.line() + "\n" for record in kept)
    if text.encode() != durable.read_regular(path):
        files.write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return kept


def train_line(record: Record, steps: int, epochs: int, eta_s: float) -> str:
    """The console line of one flush."""
    minutes, seconds = divmod(int(eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    value = record.values
    memory = f"{value['peak_memory_gib']:.2f} GiB  " if "peak_memory_gib" in value else ""
    return (
        f"step {record.step}/{steps}  epoch {record.epoch:.2f}/{epochs}  "
        f"loss {value['loss']:.3f} (random {value['loss_random']:.2f})  "
        f"pretext {100 * value['pretext_top1']:.1f} %  lr {value['lr']:.4g}  "
        f"{value['images_per_second']:.1f} images/s  {value['step_ms_p50']:.0f} ms/step  "
        f"wait {value['data_wait_percent']:.1f} %  {memory}"
        f"eta {hours}:{minutes:02d}:{seconds:02d}{'  (warm-up)' * record.warmup}"
    )
