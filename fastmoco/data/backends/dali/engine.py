"""The DALI backend: builds the pipeline at any micro-batch, and rebuilds it around bad files.

A decode error ends the whole DALI pipeline. Then every sample that was on its way is tested: one
that PIL does not decode is quarantined, one that only DALI refuses is decoded by PIL from then on,
and a new pipeline repeats the batch. All other rows stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch

from fastmoco.config import Config, ConfigError, OneRankError
from fastmoco.data.backends.dali import graph
from fastmoco.data.backends.dali.reader import Delivery
from fastmoco.data.batch import Batch
from fastmoco.data.decode import BadImage, decode
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Reader, read_work
from fastmoco.machine.host import cores

_REPAIRS = 20
# How a traceback names errors whose message is for the user.
_SENTENCES = [f"{kind.__module__}.{kind.__name__}" for kind in (ConfigError, OneRankError)]


class DaliEngine:
    """Micro-batches from a DALI pipeline, in order, starting anywhere."""

    backend = "dali"

    def __init__(self, config: Config, plan: Plan, reader: Reader, device: torch.device) -> None:
        self.reader, self.plan, self.augment = reader, plan, config.augment
        self.prefetch, self.device = config.data.prefetch, device
        # A reader process delivers more than 5,000 samples per second, about what one GPU consumes.
        self.readers = config.data.workers or (2 if cores() >= 8 else 1)
        # A GPU decodes itself: threads only parse headers and copy. More than 8 brought nothing.
        self.threads = config.data.threads or max(1, min(8, cores() - self.readers))
        self.description = (
            f"dali on {device.type}: {self.readers} reader processes, {self.threads} threads, "
            f"{self.prefetch} batches ahead"
        )
        self._pipe: Any = None
        self._micro_step = 0

    @property
    def _device_id(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch."""
        self.close()
        self._micro_step = micro_step
        shape = graph.Shape(
            side=self.augment.image_size,
            device="cpu" if self._device_id is None else "gpu",
            two_decodes=self.plan.key_rows is not None,
            one_view=self.plan.views == 1,
        )
        self._pipe = graph.build(
            Delivery(self.reader, self.plan, self.augment, micro_step),
            shape,
            batch=self.plan.local_batch,
            threads=self.threads,
            readers=self.readers,
            prefetch=self.prefetch,
            device_id=self._device_id,
        )
        self._pipe.build()

    def next(self) -> Batch:
        """The next micro-batch. Raises `OneRankError` where no sample can replace a bad one."""
        for _ in range(_REPAIRS):
            try:
                views = self._run()
            except graph.NOT_DALI:
                raise
            except RuntimeError as error:
                self._repair(error)
                self.start(self._micro_step)
            except Exception as error:  # DALI leaves of a reader's error no more than its traceback
                name, _, told = str(error).strip().rpartition("\n")[2].partition(": ")
                if name not in _SENTENCES:
                    raise
                raise OneRankError(told) from None
            else:
                self._micro_step += 1
                return views
        raise RuntimeError(f"DALI failed on micro-batch {self._micro_step} {_REPAIRS} times")

    def _run(self) -> Batch:
        assert self._pipe is not None, "start comes first"
        # The outputs are bound to torch's stream: DALI reuses them only after the copies below.
        stream = None if self._device_id is None else torch.cuda.current_stream(self.device)
        outputs = self._pipe.run(stream)
        views, replaced = graph.to_torch(outputs, self.device)
        n = self.plan.local_batch
        return Batch(views[:n], views[n:], replaced.numpy())

    def _repair(self, error: RuntimeError) -> None:
        """Finds what made the pipeline fail; raises the error again if no image did."""
        seen: set[int] = set()
        # The failed batch is the next one or any behind it that is already on its way.
        for micro_step in range(self._micro_step, self._micro_step + 2 * self.prefetch + 1):
            work = read_work(self.reader, self.plan, self.augment, micro_step)
            fresh = {one.sample: one.data for one in (*work.queries, *work.keys)}
            fresh = {sample: data for sample, data in fresh.items() if sample not in seen}
            seen |= fresh.keys()
            bad = {sample: why for sample, data in fresh.items() if (why := self._bad(data))}
            self.reader.quarantine(bad)
            good = [sample for sample in fresh if sample not in bad]
            refused = graph.refused_by_decoder([fresh[s] for s in good], self._device_id)
            self.reader.by_pil.update(good[at] for at in refused)
            if bad or refused:
                return
        raise error

    def _bad(self, data: bytes) -> str:
        """Why PIL does not decode these bytes; empty if it does."""
        try:
            decode(data, self.reader.rule)
        except BadImage as bad:
            return str(bad)
        return ""

    def close(self) -> None:
        """Ends the reader processes and frees DALI's memory."""
        self._pipe = None
