"""Group batch norm, addition and ReLU in channels-last memory: three launches, and three backward.

A group is `rows` = samples x H x W consecutive rows of C channels, cut into pieces of
`rows_per_program` rows; a program reduces or maps BLOCK_C channels of a piece. With d = x - mean:

    z = d scale + bias (+ residual),  y = relu(z),  scale = weight / sqrt(var + eps)
    g = dy where y > 0
    dx = scale (g - mean(g) - d mean(g d) / (var + eps))

Nothing is added atomically: pieces leave partial results, which a second launch merges in a fixed
order. Sums are float32. A piece's squares are taken around the mean of its first BLOCK_R rows: that
is at most sqrt(rows / BLOCK_R) standard deviations of the piece away from its own mean, so no more
than the factor 1 + rows / BLOCK_R of float32's precision can cancel, for whatever values.
Pieces of the first pass over a tensor run from its end, which the launch before has left in the
cache, and those of the second pass from its beginning.
"""

from __future__ import annotations

from fastmoco_kernels.launch import jit, tl


@jit
def _columns(C, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels of this program and which of them exist."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return column, column < C


@jit
def _affine(weight, bias, mean, var, at, column, exists, eps):  # type: ignore[no-untyped-def]
    """Mean, scale and bias of the channels in the group whose statistics begin at `at`."""
    center = tl.load(mean + at + column, mask=exists, other=0.0)
    spread = tl.load(var + at + column, mask=exists, other=1.0)
    scale = tl.load(weight + column, mask=exists, other=0.0) * tl.rsqrt(spread + eps)
    return center, scale, tl.load(bias + column, mask=exists, other=0.0)


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    x,  # (G, rows, C)
    part_mean,  # (G, pieces, C) float32
    part_square,  # (G, pieces, C) float32, sums of squared distances from part_mean
    C,
    rows,
    rows_per_program,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    piece = tl.num_programs(1) - 1 - tl.program_id(1)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    begin = piece * rows_per_program
    size = tl.minimum(rows_per_program, rows - begin)
    base = x + (group.to(tl.int64) * rows + begin) * C
    lane = tl.arange(0, BLOCK_R)
    at = lane[:, None] * C + column[None, :]
    first = tl.load(base + at, mask=(lane < size)[:, None] & exists[None, :], other=0.0)
    shift = tl.sum(first.to(tl.float32), 0) / tl.minimum(size, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(0, size, BLOCK_R, loop_unroll_factor=2):
        inside = (lane < size - start)[:, None] & exists[None, :]
        value = tl.load(base + start * C + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - shift[None, :], 0.0)
        total += value
        square += value * value
    sums = tl.sum(total, 0)
    squares = tl.sum(square, 0) - sums * sums / size
    to = (group * tl.num_programs(1) + piece) * C + column
    tl.store(part_mean + to, shift + sums / size, mask=exists)
    tl.store(part_square + to, tl.where(squares < 0.0, 0.0, squares), mask=exists)  # NaN stays


@jit
def merge_statistics_kernel(  # type: ignore[no-untyped-def]
    part_mean,  # (G, pieces, C) float32
    part_square,  # (G, pieces, C) float32
    mean,  # (G, C) float32
    var,  # (G, C) float32, biased
    running_mean,  # (C,) float32
    running_var,  # (C,) float32, unbiased
    counter,  # () int64
    C,
    rows,
    rows_per_program,
    pieces,
    groups,
    momentum,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    means = tl.zeros([BLOCK_C], tl.float32)
    variances = tl.zeros([BLOCK_C], tl.float32)
    for first_group in range(0, groups, BLOCK_G):
        group = first_group + tl.arange(0, BLOCK_G)
        valid = (group < groups)[:, None] & exists[None, :]
        at = group[:, None] * pieces * C + column[None, :]
        # Around the first piece's mean: weighted sums of large means would round.
        origin = tl.load(part_mean + at, mask=valid, other=0.0)
        total = tl.zeros([BLOCK_G, BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, pieces, BLOCK_P):
            piece = first + tl.arange(0, BLOCK_P)
            inside = valid[:, None, :] & (piece < pieces)[None, :, None]
            size = tl.minimum(rows_per_program, rows - piece * rows_per_program).to(tl.float32)
            there = at[:, None, :] + piece[None, :, None] * C
            value = tl.load(part_mean + there, mask=inside, other=0.0) - origin[:, None, :]
            total += tl.where(inside, value * size[None, :, None], 0.0)
        center = origin + tl.sum(total, 1) / rows
        total = tl.zeros([BLOCK_G, BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, pieces, BLOCK_P):
            piece = first + tl.arange(0, BLOCK_P)
            inside = valid[:, None, :] & (piece < pieces)[None, :, None]
            size = tl.minimum(rows_per_program, rows - piece * rows_per_program).to(tl.float32)
            there = at[:, None, :] + piece[None, :, None] * C
            apart = tl.load(part_mean + there, mask=inside, other=0.0) - center[:, None, :]
            value = tl.load(part_square + there, mask=inside, other=0.0)
            total += tl.where(inside, value + apart * apart * size[None, :, None], 0.0)
        spread = tl.sum(total, 1) / rows
        to = group[:, None] * C + column[None, :]
        tl.store(mean + to, center, mask=valid)
        tl.store(var + to, spread, mask=valid)
        means += tl.sum(tl.where(valid, center, 0.0), 0)
        variances += tl.sum(tl.where(valid, spread, 0.0), 0)
    old = tl.load(running_mean + column, mask=exists, other=0.0)
    tl.store(running_mean + column, old + momentum * (means / groups - old), mask=exists)
    unbiased = variances / groups * (rows.to(tl.float32) / (rows - 1))
    old = tl.load(running_var + column, mask=exists, other=0.0)
    tl.store(running_var + column, old + momentum * (unbiased - old), mask=exists)
    if tl.program_id(0) == 0:
        tl.store(counter, tl.load(counter) + 1)


@jit
def normalize_kernel(  # type: ignore[no-untyped-def]
    x,  # (G, rows, C)
    residual,  # (G, rows, C) or None
    y,  # (G, rows, C)
    weight,  # (C,) float32
    bias,  # (C,) float32
    mean,  # (G, C) float32
    var,  # (G, C) float32
    C,
    rows,
    rows_per_program,
    eps,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    begin, group = tl.program_id(1) * rows_per_program, tl.program_id(2)
    size = tl.minimum(rows_per_program, rows - begin)
    base = (group.to(tl.int64) * rows + begin) * C
    # Not x scale + (bias - mean scale): its terms are as large as the mean and would round.
    center, scale, shift = _affine(weight, bias, mean, var, group * C, column, exists, eps)
    lane = tl.arange(0, BLOCK_R)
    at = lane[:, None] * C + column[None, :]
    for start in range(0, size, BLOCK_R):
        inside = (lane < size - start)[:, None] & exists[None, :]
        place = base + start * C
        d = tl.load(x + place + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
        z = d * scale[None, :] + shift[None, :]
        if residual is not None:
            z += tl.load(residual + place + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)  # NaN stays
        tl.store(y + place + at, z.to(y.dtype.element_ty), mask=inside)
