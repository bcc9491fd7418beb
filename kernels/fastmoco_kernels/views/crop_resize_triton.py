"""Crops of a ragged list of pictures, resized on CUDA in two launches, exact to PIL's last bit.

1. `coefficients_kernel`: along both axes of each view, which pixels an output pixel is made of and
   their weights of 22 bits: a triangle as wide as the output pixel, at least two pixels.
2. `resize_kernel`: a program has a few lines of a view. Of each line of the picture that they need
   it makes the resized line, rounds it to 8 bits as PIL does between its two passes, and adds it to
   those lines with their weights. Nothing is kept between the passes.

A row of the table is a view: the address of its picture, the strides of channel, line and column,
top, left, height and width of the box, the taps along the height and along the width, and whether
lines and columns have changed places, for boxes whose height PIL resizes first. No atomics; weights
are computed in float64 in the order of PIL's C code, where nothing is fused.
"""

from __future__ import annotations

from fastmoco_kernels.launch import jit, tl

ADDRESS, CHANNEL, LINE, COLUMN, TOP, LEFT, SIZES, TAPS, TURNED = (
    tl.constexpr(column) for column in (0, 1, 2, 3, 4, 5, 6, 8, 10)
)
COLUMNS = tl.constexpr(11)
HALF = tl.constexpr(1 << 21)
BITS = tl.constexpr(22)


@jit
def _triangle(place, center, narrow):  # type: ignore[no-untyped-def]
    """Of pixels at these places, before the weights of an output pixel are made to sum to one."""
    distance = tl.abs((place.to(tl.float64) - center + 0.5) * narrow)
    return tl.where(distance < 1.0, 1.0 - distance, 0.0)


@jit
def coefficients_kernel(  # type: ignore[no-untyped-def]
    table,  # (B, COLUMNS) int64
    coefficients,  # (B, 2, ROOM, S) int32: first pixel, then weights; along height, along width
    ROOM,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    CHUNKS: tl.constexpr = (SIDE + BLOCK - 1) // BLOCK
    line, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    row = table + (line // 2) * COLUMNS + line % 2
    size, taps = tl.load(row + SIZES).to(tl.int32), tl.load(row + TAPS).to(tl.int32)
    lane = chunk * BLOCK + tl.arange(0, BLOCK)
    inside, out = lane < SIDE, tl.minimum(lane, SIDE - 1)
    scale = tl.full((BLOCK,), 0.0, tl.float64) + size.to(tl.float64)
    scale /= SIDE
    support = tl.maximum(scale, 1.0)
    narrow = 1.0 / support
    center = (out.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((center + support + 0.5).to(tl.int32), size)
    total = tl.zeros((BLOCK,), tl.float64)
    for tap in range(0, taps):
        weight = _triangle(first + tap, center, narrow)
        total += tl.where(first + tap < end, weight, 0.0)
    target = coefficients + line.to(tl.int64) * ROOM * SIDE + out
    tl.store(target, first, inside)
    for tap in range(0, taps):
        weight = _triangle(first + tap, center, narrow) / total
        rounded = (0.5 + weight * 4194304.0).to(tl.int32)
        tl.store(target + (tap + 1) * SIDE, tl.where(first + tap < end, rounded, 0), inside)


@jit
def _resized_line(line, channel, step, weights, first, last, taps, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A line of a picture resized along its width: red, green and blue, 0 to 255 in int32."""
    red = tl.zeros_like(first) + HALF
    green = tl.zeros_like(first) + HALF
    blue = tl.zeros_like(first) + HALF
    for tap in range(0, taps):
        weight = tl.load(weights + (tap + 1) * SIDE)
        pixel = line + tl.minimum(first + tap, last) * step
        red += tl.load(pixel).to(tl.int32) * weight
        green += tl.load(pixel + channel).to(tl.int32) * weight
        blue += tl.load(pixel + 2 * channel).to(tl.int32) * weight
    return red >> BITS, green >> BITS, blue >> BITS


@jit
def resize_kernel(  # type: ignore[no-untyped-def]
    table,  # (B, COLUMNS) int64
    coefficients,  # (B, 2, ROOM, S) int32
    out,  # (B, S, S, 3) uint8
    ROOM,
    SIDE: tl.constexpr,
    LINES: tl.constexpr,  # of a view per program
    WIDTH: tl.constexpr,  # pixels of a line per program
):
    STRIPS: tl.constexpr = (SIDE + WIDTH - 1) // WIDTH
    GROUPS: tl.constexpr = (SIDE + LINES - 1) // LINES
    strip, group = tl.program_id(0) % STRIPS, tl.program_id(0) // STRIPS % GROUPS
    view = tl.program_id(0) // (STRIPS * GROUPS)
    row = table + view * COLUMNS
    channel, step = tl.load(row + CHANNEL), tl.load(row + COLUMN)
    height, width = tl.load(row + SIZES).to(tl.int32), tl.load(row + SIZES + 1).to(tl.int32)
    high, wide = tl.load(row + TAPS).to(tl.int32), tl.load(row + TAPS + 1).to(tl.int32)
    picture = tl.load(row + ADDRESS).to(tl.pointer_type(tl.uint8))
    picture += tl.load(row + TOP) * tl.load(row + LINE) + tl.load(row + LEFT) * step

    down = coefficients + view.to(tl.int64) * 2 * ROOM * SIDE
    x = strip * WIDTH + tl.arange(0, WIDTH)[None, :]
    y = group * LINES + tl.arange(0, LINES)[:, None]
    # Clamped instead of masked: what lanes beyond the side make is not stored.
    across = down + ROOM.to(tl.int64) * SIDE + tl.minimum(x, SIDE - 1)
    first = tl.load(across)
    top = tl.load(down + y, y < SIDE, 0)
    lowest = tl.minimum((group + 1) * LINES, SIDE) - 1
    end = tl.minimum(tl.load(down + lowest) + high, height)

    red = tl.zeros((LINES, WIDTH), tl.int32) + HALF
    green = tl.zeros((LINES, WIDTH), tl.int32) + HALF
    blue = tl.zeros((LINES, WIDTH), tl.int32) + HALF
    for at in range(tl.load(down + group * LINES), end):
        line = picture + at * tl.load(row + LINE)
        r, g, b = _resized_line(line, channel, step, across, first, width - 1, wide, SIDE)
        tap = at - top
        weight = tl.load(down + (tap + 1) * SIDE + y, (y < SIDE) & (tap >= 0) & (tap < high), 0)
        red += r * weight
        green += g * weight
        blue += b * weight
    place = tl.where(tl.load(row + TURNED) > 0, x * SIDE + y, y * SIDE + x)
    target = out + view.to(tl.int64) * (SIDE * SIDE * 3) + place * 3
    inside = (y < SIDE) & (x < SIDE)
    tl.store(target, (red >> BITS).to(tl.uint8), inside)
    tl.store(target + 1, (green >> BITS).to(tl.uint8), inside)
    tl.store(target + 2, (blue >> BITS).to(tl.uint8), inside)
