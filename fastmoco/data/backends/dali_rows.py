"""Rows of the table in the form that DALI executes: numbers only, every choice already made.

The colour jitter of a row becomes a programme: up to three blends, the hue shift, up to three
blends. A blend (brightness, contrast, saturation) is y = f x + (1 - f) d, where d is black, the
image's own mean gray, or its gray, as `kind` says.

N rows.
"""

from __future__ import annotations

import numpy as np

from fastmoco.data.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, Float32, ViewTable

SLOTS = 3
KINDS = {BRIGHTNESS: 1, CONTRAST: 2, SATURATION: 3}
"""`kind` of each operation; 0 is an empty slot."""

BOX = slice(0, 4)
JITTER, SHIFTS, SHIFT = 4, 5, 6
BEFORE, AFTER = 7, 7 + 2 * SLOTS
GRAY, SIGMA, WINDOW, FLIP = (AFTER + 2 * SLOTS + k for k in range(4))
COLUMNS = FLIP + 1


def programme(table: ViewTable) -> Float32:
    """(N, COLUMNS) float32. Slot s of BEFORE and AFTER has its kind at + 2s, its f at + 2s + 1."""
    rows = np.zeros((len(table), COLUMNS), dtype=np.float32)
    rows[:, BOX] = table.crop
    rows[:, JITTER] = table.jitter
    hue = table.factors[:, HUE].astype(np.float64)
    rows[:, SHIFTS] = hue != 0
    # torchvision: truncate toward zero, then wrap around in uint8.
    rows[:, SHIFT] = np.trunc(hue * 255).astype(np.int64) % 256
    place = np.argmax(table.order == HUE, axis=1)
    number = np.arange(len(table))
    for slot in range(4):
        operation = table.order[:, slot]
        before = slot < place
        column = np.where(before, BEFORE + 2 * slot, AFTER + 2 * (slot - place - 1))
        blends = operation != HUE
        kind = np.array([KINDS.get(code, 0) for code in range(4)])[operation]
        rows[number[blends], column[blends]] = kind[blends]
        rows[number[blends], column[blends] + 1] = table.factors[number, operation][blends]
    rows[:, GRAY] = table.gray
    rows[:, SIGMA] = table.sigma
    rows[:, WINDOW] = blur_window(table.sigma)
    rows[:, FLIP] = table.flip
    return rows


def blur_window(sigma: Float32) -> Float32:
    """Taps of a kernel as wide as PIL's, which stacks three boxes of length sqrt(4 sigma^2 + 1)."""
    reach = 1.5 * (np.sqrt(4.0 * np.square(sigma, dtype=np.float64) + 1.0) - 1.0)
    taps: Float32 = (2 * np.maximum(1, np.ceil(reach)) + 1).astype(np.float32)
    return taps
