"""What a run that looks healthy may suffer from, told from its own numbers."""

from __future__ import annotations

import math

from fastmoco.config import Config
from fastmoco.run.record import Record


def alarms(record: Record, config: Config) -> list[str]:
    """The two silent failures of MoCo in a `train` record, as sentences; empty while none shows.

    Both need a dictionary that has turned over twice: it starts random and the loss first rises.
    """
    loss, top1 = record.values["loss"], record.values["pretext_top1"]
    views = 2 if config.moco.symmetric else 1
    guess = math.log(1 + config.negatives())
    turnovers = record.step * views * config.optim.global_batch_size / config.negatives()
    if config.moco.mechanism == "memory_bank":
        turnovers = record.epoch
    if turnovers < 2:
        return []
    if top1 > 0.999:
        return [
            f"pretext accuracy is {100 * top1:.2f} %: batch norm probably tells queries which key "
            "is theirs, and the features will be poor; check moco.shuffle_bn and moco.bn_group_size"
        ]
    if loss > 0.995 * guess:
        return [
            f"loss {loss:.3f} is that of a random guess, ln(1+K) = {guess:.3f}: "
            "the encoder is not learning; check the learning rate and the images (views.png)"
        ]
    return []
