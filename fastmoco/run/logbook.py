"""The record of a run: metrics.jsonl, TensorBoard with the same names, and the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastmoco.machine import durable
from fastmoco.run.record import Record, read_records
from fastmoco.weights import files

EVENTS = "events.out.tfevents.*"
"""Files of TensorBoard; each start adds one."""


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
        self._path = folder / "metrics.jsonl"
        kept = _records_until(self._path, done)
        self._written = {(record.kind, record.step) for record in kept}
        self._unwritten: list[Record] = []
        self._not_on_board: list[Record] = []
        self._last_on_board: list[Record] = []
        self._folder, self._purge = folder, done + 1 if done else 0
        self._board: SummaryWriter | None = None
        self._events: set[Path] = set()
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._enabled:
            if self._board is not None:
                with contextlib.suppress(OSError):
                    self._board.close()
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

    def record(self, record: Record, text: str) -> None:
        """Append one record to metrics.jsonl and its numbers to TensorBoard; `text` says it."""
        if not self._enabled:
            return
        self.say(text)
        if self.send is not None:
            self.send(record)
        self._written.add((record.kind, record.step))
        self._unwritten.append(record)
        try:
            files.append(self._path, "".join(one.line() + "\n" for one in self._unwritten))
            self._not_on_board += self._unwritten
            self._unwritten = []
            self._to_board()
        except OSError as error:
            if not self._failing:
                self.warn(f"{self._path} cannot be written ({error}): it is tried again later.")
            self._failing = True
        else:
            self._failing = False

    def _to_board(self) -> None:
        """Opened with its first record, and again after a failure, which ends its thread."""
        new = self._not_on_board
        try:
            if self._board is None:
                before = set(self._folder.glob(EVENTS))
                self._board = SummaryWriter(str(self._folder), purge_step=self._purge)
                self._events = set(self._folder.glob(EVENTS)) - before
            for record in new:
                for name, value in record.values.items():
                    self._board.add_scalar(name, value, record.step)
            self._board.flush()  # the file then has what metrics.jsonl has, whenever it ends
            for file in self._events:
                durable.flush(file)  # and has it after a power loss too
        except OSError:
            self._board, self._purge = None, new[0].step
            # The next file takes the place of all that earlier ones have from this step on.
            again = [record for record in self._last_on_board if record.step >= self._purge]
            self._not_on_board, self._last_on_board = again + new, []
            raise
        shown = self._last_on_board + new
        self._last_on_board = [record for record in shown if record.step == new[-1].step]
        self._not_on_board = []


def _records_until(path: Path, done: int) -> list[Record]:
    """Leave in the file only whole records of at most `done` steps, none where it is 0."""
    if not path.exists():
        return []
    records = read_records(path)
    kept = [record for record in records if done and record.step <= done]
    text = "".join(record.line() + "\n" for record in kept)
    if text.encode() != path.read_bytes():
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
