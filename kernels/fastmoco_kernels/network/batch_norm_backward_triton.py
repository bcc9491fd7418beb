"""The backward of batch_norm_triton.py, whose symbols and rules hold here too.

Where the ReLU let nothing through is seen again from x, which is read anyway. Behind an addition
that would need the residual as well, and y is read instead, which the next convolution keeps in any
case; then the first pass writes g, the gradient of the residual, and the second reads it in
the place of dy and y: seven passes over a tensor instead of eight.
"""

from __future__ import annotations

from fastmoco_kernels.launch import jit, tl
from fastmoco_kernels.network.batch_norm_triton import _affine, _columns


@jit
def gradient_sums_kernel(  # type: ignore[no-untyped-def]
    x,  # (G, rows, C)
    dy,  # (G, rows, C)
    y,  # (G, rows, C), or None
    g,  # (G, rows, C), written where y is given
    weight,  # (C,) float32
    bias,  # (C,) float32
    mean,  # (G, C) float32
    var,  # (G, C) float32
    part_sum,  # (G, pieces, C) float32, of g
    part_dot,  # (G, pieces, C) float32, of g d
    C,
    rows,
    rows_per_program,
    eps,
    RECOMPUTE: tl.constexpr,  # the ReLU, from x
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    piece = tl.num_programs(1) - 1 - tl.program_id(1)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    begin = piece * rows_per_program
    size = tl.minimum(rows_per_program, rows - begin)
    base = (group.to(tl.int64) * rows + begin) * C
    center, scale, shift = _affine(weight, bias, mean, var, group * C, column, exists, eps)
    lane = tl.arange(0, BLOCK_R)
    at = lane[:, None] * C + column[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dot = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, size, BLOCK_R):
        inside = (lane < size - start)[:, None] & exists[None, :]
        place = base + start * C
        d = tl.load(x + place + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
        grad = tl.load(dy + place + at, mask=inside, other=0.0).to(tl.float32)
        if RECOMPUTE:
            grad = tl.where(d * scale[None, :] + shift[None, :] <= 0.0, 0.0, grad)
        if y is not None:
            out = tl.load(y + place + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.where(out <= 0.0, 0.0, grad)
            tl.store(g + place + at, grad.to(g.dtype.element_ty), mask=inside)
        total += grad
        dot += grad * d
    to = (group * tl.num_programs(1) + piece) * C + column
    tl.store(part_sum + to, tl.sum(total, 0), mask=exists)
    tl.store(part_dot + to, tl.sum(dot, 0), mask=exists)


@jit
def merge_gradients_kernel(  # type: ignore[no-untyped-def]
    part_sum,  # (G, pieces, C) float32
    part_dot,  # (G, pieces, C) float32
    var,  # (G, C) float32
    mean_g,  # (G, C) float32, mean of g
    slope,  # (G, C) float32, mean of g d / (var + eps)
    grad_weight,  # (C,) float32
    grad_bias,  # (C,) float32
    C,
    rows,
    pieces,
    groups,
    eps,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    of_weight = tl.zeros([BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    for first_group in range(0, groups, BLOCK_G):
        group = first_group + tl.arange(0, BLOCK_G)
        valid = (group < groups)[:, None] & exists[None, :]
        at = group[:, None] * pieces * C + column[None, :]
        total = tl.zeros([BLOCK_G, BLOCK_P, BLOCK_C], tl.float32)
        dot = tl.zeros([BLOCK_G, BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, pieces, BLOCK_P):
            piece = first + tl.arange(0, BLOCK_P)
            inside = valid[:, None, :] & (piece < pieces)[None, :, None]
            there = at[:, None, :] + piece[None, :, None] * C
            total += tl.load(part_sum + there, mask=inside, other=0.0)
            dot += tl.load(part_dot + there, mask=inside, other=0.0)
        to = group[:, None] * C + column[None, :]
        inverse = tl.rsqrt(tl.load(var + to, mask=valid, other=1.0) + eps)
        sums, dots = tl.sum(total, 1), tl.sum(dot, 1) * inverse
        tl.store(mean_g + to, sums / rows, mask=valid)
        tl.store(slope + to, dots * inverse / rows, mask=valid)
        of_bias += tl.sum(sums, 0)
        of_weight += tl.sum(dots, 0)
    tl.store(grad_weight + column, of_weight, mask=exists)
    tl.store(grad_bias + column, of_bias, mask=exists)


@jit
def input_gradient_kernel(  # type: ignore[no-untyped-def]
    x,  # (G, rows, C)
    g,  # (G, rows, C): dy where RECOMPUTE
    dx,  # (G, rows, C)
    weight,  # (C,) float32
    bias,  # (C,) float32
    mean,  # (G, C) float32
    var,  # (G, C) float32
    mean_g,  # (G, C) float32
    slope,  # (G, C) float32
    C,
    rows,
    rows_per_program,
    eps,
    RECOMPUTE: tl.constexpr,  # the ReLU, from x
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, exists = _columns(C, BLOCK_C)
    begin, group = tl.program_id(1) * rows_per_program, tl.program_id(2)
    size = tl.minimum(rows_per_program, rows - begin)
    base = (group.to(tl.int64) * rows + begin) * C
    center, scale, shift = _affine(weight, bias, mean, var, group * C, column, exists, eps)
    average = tl.load(mean_g + group * C + column, mask=exists, other=0.0)
    tilt = tl.load(slope + group * C + column, mask=exists, other=0.0)
    lane = tl.arange(0, BLOCK_R)
    at = lane[:, None] * C + column[None, :]
    for start in range(0, size, BLOCK_R):
        inside = (lane < size - start)[:, None] & exists[None, :]
        place = base + start * C
        d = tl.load(x + place + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
        grad = tl.load(g + place + at, mask=inside, other=0.0).to(tl.float32)
        if RECOMPUTE:
            grad = tl.where(d * scale[None, :] + shift[None, :] <= 0.0, 0.0, grad)
        grad = scale[None, :] * (grad - average[None, :] - d * tilt[None, :])
        tl.store(dx + place + at, grad.to(dx.dtype.element_ty), mask=inside)
