"""The photometric half of the augmentation on CUDA in three launches, exact to PIL's last bit.

1. `luminance_kernel`: sums of the luminance that PIL's contrast sees, of chunks of a view.
2. `colour_kernel`: a program has whole lines of a view. It does the colour operations of the row
   and, where the row blurs, three boxes along these lines.
3. `columns_kernel`: three boxes along strips of columns, of the views that are blurred.

A box reads what other threads of its program wrote into global memory, behind a barrier: the lines
of a program are a few KiB, which stay in the cache. Views ping-pong between `out` and `scratch`,
so that what the sixth box writes is in `out`. Nothing is written by two programs, no atomics.

Values are whole numbers in float32. Multiplications and additions must not be fused, because PIL
rounds after each of them (`Launch.fused_multiply_add`).
"""

from __future__ import annotations

from fastmoco_kernels.launch import jit, tl

# Columns of a row, as fastmoco/data/photometric_rows.py writes them.
FLIP = tl.constexpr(4)
RADIUS = tl.constexpr(5)  # whole part of the radius of the box, -1: no blur
INNER = tl.constexpr(6)
OUTER = tl.constexpr(7)
BEFORE_CONTRAST = tl.constexpr(8)  # slots before that of contrast, -1: no contrast
SLOTS = tl.constexpr(9)
NUMBER_OF_SLOTS = tl.constexpr(5)
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(kind) for kind in (1, 2, 3, 4))


@jit
def _luminance(red, green, blue):  # type: ignore[no-untyped-def]
    """PIL's conversion to gray; the sums are below 2^24, so float32 holds them."""
    total = red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0
    return tl.floor(total * (1.0 / 65536.0))


@jit
def _blend(value, other, factor):  # type: ignore[no-untyped-def]
    mixed = other + factor * (value - other)
    return tl.floor(tl.minimum(tl.maximum(mixed, 0.0), 255.0))


@jit
def _with_hue(value, saturated, hue, offset: tl.constexpr):  # type: ignore[no-untyped-def]
    """A channel by HSV's formula with its ramp, in 1/255 of a sixth of a turn; no ties arise."""
    angle = hue * 6 + 255 * offset
    angle = tl.where(angle >= 1530, angle - 1530, angle)
    ramp = tl.minimum(tl.maximum(tl.minimum(angle, 1020 - angle), 0), 255)
    return (value - (2 * saturated * ramp + 65025) // 130050).to(tl.float32)


@jit
def _shift_hue(red, green, blue, amount):  # type: ignore[no-untyped-def]
    """PIL's way through HSV with its roundings, float64 where it has a double; amount in 1/256."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    from_red, from_green = red == value, green == value
    ahead = tl.where(from_red, blue, tl.where(from_green, red, green))
    behind = tl.where(from_red, green, tl.where(from_green, blue, red))
    place = tl.where(from_red, 0.0, tl.where(from_green, 2.0, 4.0)).to(tl.float64)
    divisor = tl.maximum(chroma, 1.0)
    place += tl.div_rn(value - ahead, divisor).to(tl.float64)
    place -= tl.div_rn(value - behind, divisor).to(tl.float64)
    turns = tl.div_rn(place.to(tl.float32), 6.0 + 0.0 * divisor)
    turns = tl.where(turns < 0.0, turns + 1.0, turns)
    hue = ((turns * 255.0).to(tl.int32) + amount) & 255
    saturation = tl.div_rn(chroma * 255.0, tl.maximum(value, 1.0)).to(tl.int32)
    whole = value.to(tl.int32)
    saturated = whole * saturation
    return (
        _with_hue(whole, saturated, hue, 5),
        _with_hue(whole, saturated, hue, 3),
        _with_hue(whole, saturated, hue, 1),
    )


@jit
def _colours(red, green, blue, row, slots, mean):  # type: ignore[no-untyped-def]
    """The first `slots` operations of the row."""
    for slot in range(0, slots):
        kind = tl.load(row + SLOTS + 2 * slot).to(tl.int32)
        factor = tl.load(row + SLOTS + 2 * slot + 1)
        if kind == HUE:
            red, green, blue = _shift_hue(red, green, blue, factor.to(tl.int32))
        elif kind > 0:
            other = tl.zeros_like(red)
            if kind == CONTRAST:
                other += mean
            elif kind == SATURATION:
                other += _luminance(red, green, blue)
            red, green, blue = (
                _blend(red, other, factor),
                _blend(green, other, factor),
                _blend(blue, other, factor),
            )
    return red, green, blue


@jit
def _load(pointer, inside):  # type: ignore[no-untyped-def]
    return (
        tl.load(pointer, inside, 0).to(tl.float32),
        tl.load(pointer + 1, inside, 0).to(tl.float32),
        tl.load(pointer + 2, inside, 0).to(tl.float32),
    )


@jit
def luminance_kernel(  # type: ignore[no-untyped-def]
    views,  # (B, S, S, 3) uint8
    rows,  # (B, COLUMNS) float32
    sums,  # (B, CHUNKS) int32, filled for views with contrast
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    row = rows + view * COLUMNS
    before = tl.load(row + BEFORE_CONTRAST).to(tl.int32)
    if before >= 0:
        pixel = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < SIDE * SIDE
        start = views + view.to(tl.int64) * (SIDE * SIDE * 3)
        red, green, blue = _load(start + pixel * 3, inside)
        red, green, blue = _colours(red, green, blue, row, before, 0.0)
        gray = tl.where(inside, _luminance(red, green, blue), 0.0).to(tl.int32)
        tl.store(sums + tl.program_id(0), tl.sum(gray, 0))


@jit
def _tap(line, place, STRIDE: tl.constexpr, LAST: tl.constexpr, inside):  # type: ignore[no-untyped-def]
    """A pixel of a line that repeats its ends."""
    within = tl.minimum(tl.maximum(place, 0), LAST)
    return tl.load(line + within * STRIDE, inside, 0).to(tl.uint32)


@jit
def _box(line, place, STRIDE: tl.constexpr, LAST: tl.constexpr, inside, row):  # type: ignore[no-untyped-def]
    """PIL's box of fractional radius, in its 8.24 fixed point."""
    radius = tl.load(row + RADIUS).to(tl.int32)
    total = _tap(line, place, STRIDE, LAST, inside)
    for step in range(1, radius + 1):
        total += _tap(line, place - step, STRIDE, LAST, inside)
        total += _tap(line, place + step, STRIDE, LAST, inside)
    ends = _tap(line, place - radius - 1, STRIDE, LAST, inside)
    ends += _tap(line, place + radius + 1, STRIDE, LAST, inside)
    inner, outer = (tl.load(row + INNER).to(tl.uint32), tl.load(row + OUTER).to(tl.uint32))
    return ((total * inner + ends * outer + (1 << 23)) >> 24).to(tl.uint8)


@jit
def colour_kernel(  # type: ignore[no-untyped-def]
    views,  # (B, S, S, 3) uint8
    rows,  # (B, COLUMNS) float32
    sums,  # (B, CHUNKS) int32
    out,  # (B, S, S, 3) uint8
    scratch,  # (B, S, S, 3) uint8
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    LINES: tl.constexpr,  # of a view per program
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = (SIDE + LINES - 1) // LINES
    view, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    row = rows + view * COLUMNS
    mean = 0.0
    if tl.load(row + BEFORE_CONTRAST) >= 0.0:
        chunk = tl.arange(0, BLOCK_CHUNKS)
        parts = tl.load(sums + view * CHUNKS + chunk, chunk < CHUNKS, 0)
        total = tl.sum(parts, 0).to(tl.uint32)
        mean = ((total + SIDE * SIDE // 2) // (SIDE * SIDE)).to(tl.float32)
    flip = tl.load(row + FLIP) > 0.0
    start = view.to(tl.int64) * (SIDE * SIDE * 3)
    first, last = group * LINES * SIDE, tl.minimum((group + 1) * LINES, SIDE) * SIDE
    for at in range(first, last, BLOCK):
        pixel = at + tl.arange(0, BLOCK)
        inside = pixel < last
        column = pixel % SIDE
        # A mirrored view has mirrored boxes: the flip may come first.
        source = tl.where(flip, pixel - column + (SIDE - 1 - column), pixel)
        red, green, blue = _load(views + start + source * 3, inside)
        red, green, blue = _colours(red, green, blue, row, NUMBER_OF_SLOTS, mean)
        tl.store(out + start + pixel * 3, red.to(tl.uint8), inside)
        tl.store(out + start + pixel * 3 + 1, green.to(tl.uint8), inside)
        tl.store(out + start + pixel * 3 + 2, blue.to(tl.uint8), inside)
    if tl.load(row + RADIUS) >= 0.0:
        here, there = out + start, scratch + start
        for _ in tl.static_range(3):
            tl.debug_barrier()
            for at in range(first, last, BLOCK):
                pixel = at + tl.arange(0, BLOCK)
                inside = pixel < last
                column = pixel % SIDE
                for channel in tl.static_range(3):
                    line = here + (pixel - column) * 3 + channel
                    found = _box(line, column, 3, SIDE - 1, inside, row)
                    tl.store(there + pixel * 3 + channel, found, inside)
            here, there = there, here


@jit
def columns_kernel(  # type: ignore[no-untyped-def]
    rows,  # (B, COLUMNS) float32
    out,  # (B, S, S, 3) uint8
    scratch,  # (B, S, S, 3) uint8: what `colour_kernel` left of the views that are blurred
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,  # bytes of a line per program
    BLOCK: tl.constexpr,  # lines at a time
):
    BYTES: tl.constexpr = SIDE * 3
    STRIPS: tl.constexpr = (BYTES + WIDTH - 1) // WIDTH
    view, strip = tl.program_id(0) // STRIPS, tl.program_id(0) % STRIPS
    row = rows + view * COLUMNS
    if tl.load(row + RADIUS) >= 0.0:
        start = view.to(tl.int64) * (SIDE * BYTES)
        column = strip * WIDTH + tl.arange(0, WIDTH)[None, :]
        here, there = scratch + start, out + start
        for turn in tl.static_range(3):
            if turn > 0:
                tl.debug_barrier()
            for at in range(0, SIDE, BLOCK):
                place = at + tl.arange(0, BLOCK)[:, None]
                inside = (place < SIDE) & (column < BYTES)
                found = _box(here + column, place, BYTES, SIDE - 1, inside, row)
                tl.store(there + place * BYTES + column, found, inside)
            here, there = there, here
