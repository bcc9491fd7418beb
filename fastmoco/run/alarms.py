"""What a run that looks healthy may suffer from, told from its own records.

The same in the run, which warns once of each kind, and in the report, which says when each showed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastmoco.config import Config
from fastmoco.run.record import WARMUP_STEPS, Record

# The dictionary starts random, so that any key is found at first, and then the loss rises.
TURNOVERS = 2
# Nor does an encoder show anything in fewer steps: in healthy runs on small noise images the loss
# stood at ln(1+K) up to step 35, and the effective rank fell to 1.6 at step 30 and rose again.
MIN_STEPS = 50
# Public reports of leaking batch norm: 84 % at epoch 11 and 95.4 % at epoch 16 of 200.
EASY, EARLY = 0.9, 0.1
# At any time: an honest task keeps some pairs whose crops share nothing.
SOLVED = 0.999
# Of kNN or effective rank beside the untrained encoder's: less is within what repetitions differ.
GROWN = 1.1
# Fewer than two directions are one point with noise about it. The demo falls to a fourth of the
# untrained encoder's rank while kNN rises, but that is 20 of 128.
COLLAPSED_RANK = 2.0
# So many features at least, in more dimensions than that: of few any rank is small.
MIN_FEATURES, MIN_DIM = 32, 4
# By then a run on pure noise, where nothing can be learned, was already at 0.992 ln(1+K).
STUCK = 0.995
# Mean distance of a row of the queue from the key that replaced it. Of two images it was 0.02 in a
# collapsed encoder, and it is 0 where nothing is written.
UNCHANGED = 1e-3


@dataclass(frozen=True)
class Alarm:
    """Something is wrong: `sentence` says what, from which number, and what to do."""

    kind: str
    sentence: str


class Watch:
    """Reads the records of a run in order and remembers what the untrained encoder was worth."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._knn: float | None = None
        self._knn_untrained: float | None = None
        self._rank_untrained: tuple[float, float] | None = None  # and of how many features

    def see(self, record: Record) -> list[Alarm]:
        """Every alarm that this record shows."""
        values = record.values
        if record.kind == "knn_baseline":
            self._knn_untrained = values.get("untrained")
        if record.kind == "knn" and "knn_top1" in values:
            self._knn = values["knn_top1"]
            return self._poor_neighbours(self._knn)
        if record.kind != "train" or not {"loss", "pretext_top1"} <= values.keys():
            return []
        rank = values.get("effective_rank_q")
        if rank is not None and record.step <= WARMUP_STEPS:
            self._rank_untrained = (rank, values["features"])
        if record.step < MIN_STEPS or self._turnovers(record) < TURNOVERS:
            return []
        collapsed = self._collapsed(values)
        found = [*collapsed, *self._unchanged(values), *self._solved(record), *self._stuck(record)]
        return found if collapsed else [*found, *self._poor_rank(record)]

    def _turnovers(self, record: Record) -> float:
        config = self._config
        if config.moco.mechanism == "memory_bank":
            return record.epoch
        views = 2 if config.moco.symmetric else 1
        return record.step * views * config.optim.global_batch_size / config.negatives()

    def _collapsed(self, values: Mapping[str, float]) -> list[Alarm]:
        rank = values.get("effective_rank_q", math.inf)
        dim = round(values.get("std_even", 1.0) ** -2)
        if rank >= COLLAPSED_RANK or values["features"] < MIN_FEATURES or dim <= MIN_DIM:
            return []
        return [
            Alarm(
                "collapse",
                f"features collapse: the effective rank of the queries is {rank:.1f} of {dim} "
                f"dimensions at loss {values['loss']:.2f}, so all images get nearly the same "
                "feature; lower optim.lr, set optim.warmup_epochs or raise moco.momentum",
            )
        ]

    def _unchanged(self, values: Mapping[str, float]) -> list[Alarm]:
        change = values.get("queue_change", math.inf)
        if change >= UNCHANGED:
            return []
        return [
            Alarm(
                "queue",
                f"the queue no longer changes: all of its keys were due to be replaced and lie "
                f"{change:.1e} from the old ones; check that the images differ (views.png), that "
                "features do not collapse, and with fastmoco doctor that the kernels work",
            )
        ]

    def _solved(self, record: Record) -> list[Alarm]:
        """Pretext accuracy that is too good to come from learning."""
        top1, epochs = record.values["pretext_top1"], self._config.optim.epochs
        still = self._stands_still(record) if record.epoch <= EARLY * epochs else ""
        if not (top1 > SOLVED or (top1 > EASY and still)):
            return []
        return [
            Alarm(
                "leak",
                f"pretext accuracy is {100 * top1:.1f} % after {100 * record.epoch / epochs:.0f} % "
                f"of training{still}: batch norm may tell queries which key is theirs (check "
                "moco.shuffle_bn and moco.bn_group_size), the views may be too alike (views.png), "
                "or the keys drift from the queue (raise moco.momentum)",
            )
        ]

    def _stands_still(self, record: Record) -> str:
        """Which measure has not grown; kNN if there is one, because it knows labels."""
        rank = record.values.get("effective_rank_q")
        if self._knn is not None and self._knn_untrained is not None:
            if self._knn >= GROWN * self._knn_untrained:
                return ""
            return (
                f" while kNN top-1 stands at {100 * self._knn:.1f} % (untrained encoder "
                f"{100 * self._knn_untrained:.1f} %)"
            )
        if rank is None or self._rank_untrained is None or rank >= GROWN * self._rank_untrained[0]:
            return ""
        return (
            f" while the effective rank is {rank:.1f} (untrained encoder "
            f"{self._rank_untrained[0]:.1f})"
        )

    def _stuck(self, record: Record) -> list[Alarm]:
        loss, guess = record.values["loss"], math.log(1 + self._config.negatives())
        if not (loss > STUCK * guess and record.epoch >= self._config.optim.warmup_epochs):
            return []
        return [
            Alarm(
                "stuck",
                f"loss {loss:.3f} is that of a random guess, ln(1+K) = {guess:.3f}: the encoder "
                "is not learning; check the learning rate and the images (views.png)",
            )
        ]

    def _poor_rank(self, record: Record) -> list[Alarm]:
        """Effective rank below the untrained encoder's, in runs that no kNN judges.

        It falls at first in every run, so the first tenth does not count. Where kNN is to come, it
        is waited for: ResNet-18 on CIFAR-10 fell from 48 to 27 while kNN rose from 30 to 47 %.
        """
        rank, features = (record.values.get(n, math.inf) for n in ("effective_rank_q", "features"))
        before, enough = self._rank_untrained or (0.0, math.inf)
        judged = self._knn_untrained is not None
        if judged or rank >= before / GROWN or features < enough:
            return []
        if record.epoch <= EARLY * self._config.optim.epochs:
            return []
        return [
            Alarm(
                "below_untrained",
                f"the effective rank of the queries, {rank:.1f}, is below the untrained encoder's, "
                f"{before:.1f}: features use fewer directions than before training; compare kNN "
                "with the untrained encoder (knn.every), else train longer, lower optim.lr or "
                "raise moco.momentum",
            )
        ]

    def _poor_neighbours(self, top1: float) -> list[Alarm]:
        if self._knn_untrained is None or top1 >= self._knn_untrained:
            return []
        return [
            Alarm(
                "below_untrained",
                f"kNN top-1, {100 * top1:.1f} %, is below the untrained encoder's, "
                f"{100 * self._knn_untrained:.1f} %: training has made the features worse so far; "
                "if it stays so, take the preset for your data (configs/), train longer or weaken "
                "the crops (augment.min_area)",
            )
        ]
