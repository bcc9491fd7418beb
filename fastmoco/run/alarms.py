"""What a run that looks healthy may suffer from, told from its own numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping


def alarms(values: Mapping[str, float], *, keys_enqueued: int, queue_size: int) -> list[str]:
    """The two silent failures of MoCo, as sentences; empty while neither shows.

    Both need a queue that has turned over twice: it starts random and the loss first rises.
    """
    loss, top1 = values["loss"], values["pretext_top1"]
    if keys_enqueued < 2 * queue_size:
        return []
    if top1 > 0.999:
        return [
            f"pretext accuracy is {100 * top1:.2f} %: batch norm probably tells queries which key "
            "is theirs, and the features will be poor; check moco.shuffle_bn and moco.bn_group_size"
        ]
    if loss > 0.995 * math.log(1 + queue_size):
        return [
            f"loss {loss:.3f} is that of a random guess, ln(1+K) = {math.log(1 + queue_size):.3f}: "
            "the encoder is not learning; check the learning rate and the images (views.png)"
        ]
    return []
