"""The record of a run: metrics.jsonl, TensorBoard with the same names, and the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastmoco.run.record import Record


class Logbook:
    """Writes on the main rank and is silent on the others.

    `metrics.jsonl` is the record: one JSON object per line, appended and flushed at once, so that a
    killed run keeps all it had. A progress bar appears only where standard error is a terminal.
    """

    def __init__(self, folder: Path, *, enabled: bool, done: int, total: int) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._file = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder), purge_step=done or None)
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
            self._file.close()
            self._board.close()
            self._bar.close()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._enabled:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a sentence that somebody should act on."""
        self.say(f"WARNING: {text}")

    def record(self, record: Record, text: str) -> None:
        """Append one record to metrics.jsonl and its numbers to TensorBoard; `text` says it."""
        if not self._enabled:
            return
        self._file.write(record.line() + "\n")
        self._file.flush()
        for name, value in record.values.items():
            self._board.add_scalar(name, value, record.step)
        self.say(text)


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
