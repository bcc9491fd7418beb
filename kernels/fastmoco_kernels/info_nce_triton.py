"""InfoNCE on CUDA in two launches: partial sums over S slices of the queue, then their reduction.

The symbols are those of info_nce.py. Launch 1: program (i, s) holds BLOCK_N rows of q and walks
slice s of the queue; a tile of BLOCK_K queue rows is loaded once and multiplied twice, for the
logits and for the gradient. In base-2 exponentials with a shift m per row it leaves

    total_s = sum_j 2^(s_j - m_s),  weighted_s = sum_j 2^(s_j - m_s) queue_j,  above_s = ranks.

Launch 2 merges the S partials of a row with the positive, in a fixed order and without atomics, so
results are reproducible bit for bit; its other programs write the new keys. They run after every
read of the old queue because the launches are in stream order.

Rows of norm 1 bound every logit by 1/T: then m is that constant and no running maximum is needed.
EXACT, which info_nce_launch.py chooses, or a longer row of q or k brings the running maximum back.
Queue rows longer than about 1 + 80 T can make the loss infinite, never wrong and finite. Products
are in q's dtype with float32 sums (float32 as three TF32 products); k and queue are rounded to it.
"""

from __future__ import annotations

from fastmoco_kernels.launch import jit, tl

LONGEST = tl.constexpr(1.05)  # squared norm up to which a row counts as normalized


@jit
def _slice(  # type: ignore[no-untyped-def]
    q,
    queue,
    begin,
    end,
    C,
    scale,
    tie,
    EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shift, total, above (BLOCK_N,) and weighted (BLOCK_N, BLOCK_C) of queue[begin:end]."""
    column = tl.arange(0, q.shape[1])
    total = tl.zeros([q.shape[0]], tl.float32)
    above = tl.zeros([q.shape[0]], tl.int32)
    weighted = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    shift = total + (float("-inf") if EXACT else scale)
    for first in tl.range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        inside = row < end
        pointer = queue + row.to(tl.int64)[:, None] * C + column[None, :]
        values = tl.load(pointer, mask=inside[:, None] & (column < C)[None, :], other=0.0)
        values = values.to(q.dtype)
        logits = tl.dot(q, tl.trans(values), input_precision=PRECISION)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        below = logits < tie[:, None]
        above += tl.sum(((row < end)[None, :] & (below == 0)).to(tl.int32), 1)
        if EXACT:
            new_shift = tl.maximum(shift, tl.max(logits, 1) * scale)
            rescale = tl.exp2(shift - new_shift)
            total *= rescale
            weighted *= rescale[:, None]
            shift = new_shift
        p = tl.exp2(logits * scale - shift[:, None])
        total += tl.sum(p, 1)
        weighted = tl.dot(p.to(q.dtype), values, weighted, input_precision=PRECISION)
    return shift, total, above, weighted


@jit
def partial_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (N, C)
    k_ptr,  # (N, C)
    queue,  # (K, C)
    queue_ptr,  # (1,) int64, read where ENQUEUE
    cursor_ptr,  # (1,) int64, receives the old queue_ptr
    shift_ptr,  # (N, S) float32
    total_ptr,  # (N, S) float32
    above_ptr,  # (N, S) int32
    weighted_ptr,  # (S, N, C) float32
    N,
    K,
    C,
    rows_per_slice,
    scale,  # log2(e) / T
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    ENQUEUE: tl.constexpr,
    MARGIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    if ENQUEUE:  # noqa: SIM102 - the outer condition is settled when compiling
        # The reduction advances queue_ptr while its other programs need the old value.
        if (tl.program_id(0) == 0) & (piece == 0):
            tl.store(cursor_ptr, tl.load(queue_ptr))
    valid = (row < N)[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    q = tl.load(q_ptr + offset, mask=valid, other=0.0)
    k = tl.load(k_ptr + offset, mask=valid, other=0.0).to(q.dtype).to(tl.float32)
    wide = q.to(tl.float32)
    tie = tl.sum(wide * k, 1) - MARGIN * tl.sum(tl.abs(wide * k), 1)
    begin = piece * rows_per_slice
    end = tl.minimum(begin + rows_per_slice, K)
    if EXACT:
        shift, total, above, weighted = _slice(
            q, queue, begin, end, C, scale, tie, True, BLOCK_K, PRECISION
        )
    else:
        longest = tl.maximum(tl.max(tl.sum(wide * wide, 1)), tl.max(tl.sum(k * k, 1)))
        if longest > LONGEST:
            shift, total, above, weighted = _slice(
                q, queue, begin, end, C, scale, tie, True, BLOCK_K, PRECISION
            )
        else:
            shift, total, above, weighted = _slice(
                q, queue, begin, end, C, scale, tie, False, BLOCK_K, PRECISION
            )
    tl.store(shift_ptr + row * pieces + piece, shift, mask=row < N)
    tl.store(total_ptr + row * pieces + piece, total, mask=row < N)
    tl.store(above_ptr + row * pieces + piece, above, mask=row < N)
    plane = weighted_ptr + piece.to(tl.int64) * N * C
    tl.store(plane + offset, weighted, mask=valid)


@jit
def _enqueue(  # type: ignore[no-untyped-def]
    chunk,
    keys_ptr,
    queue,
    queue_ptr,
    cursor_ptr,
    M,
    K,
    C,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write CHUNK of the M keys behind the cursor of the queue; the first moves the cursor."""
    # 32-bit arithmetic: a 64-bit remainder is a call that spills. K is below 2**31.
    cursor = (tl.load(cursor_ptr).to(tl.uint32) % K.to(tl.uint32)).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    valid = (key < M)[:, None] & (column < C)[None, :]
    source = keys_ptr + key.to(tl.int64)[:, None] * C + column[None, :]
    place = cursor + key
    place = tl.where(place < K, place, place - K)
    target = queue + place[:, None] * C + column[None, :]
    fresh = tl.load(source, mask=valid, other=0.0)
    tl.store(target, fresh.to(queue.dtype.element_ty), mask=valid)
    if chunk == 0:
        tl.store(queue_ptr, tl.where(cursor + M < K, cursor + M, cursor + M - K))


@jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (N, C)
    k_ptr,  # (N, C)
    shift_ptr,  # (N, S) float32
    total_ptr,  # (N, S) float32
    above_ptr,  # (N, S) int32
    weighted_ptr,  # (S, N, C) float32
    losses_ptr,  # (N,) float32
    rank_ptr,  # (N,) int64
    dq_ptr,  # (N, C) float32
    keys_ptr,  # (M, C)
    queue,  # (K, C)
    queue_ptr,  # (1,) int64
    cursor_ptr,  # (1,) int64
    N,
    S,
    M,
    K,
    C,
    scale,  # log2(e) / T
    gradient_scale,  # 1 / (T N)
    BLOCK_S: tl.constexpr,  # all slices
    CHUNK: tl.constexpr,  # slices, or keys, in registers at a time
    BLOCK_C: tl.constexpr,
    ENQUEUE: tl.constexpr,
):
    n = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    if n < N:
        q = tl.load(q_ptr + n * C + column, mask=column < C, other=0.0)
        k = tl.load(k_ptr + n * C + column, mask=column < C, other=0.0)
        k = k.to(q.dtype).to(tl.float32)
        positive = tl.sum(q.to(tl.float32) * k, 0) * scale
        every = tl.arange(0, BLOCK_S)
        shifts = tl.load(shift_ptr + n * S + every, mask=every < S, other=float("-inf"))
        totals = tl.load(total_ptr + n * S + every, mask=every < S, other=0.0)
        above = tl.load(above_ptr + n * S + every, mask=every < S, other=0)
        shift = tl.maximum(tl.max(shifts, 0), positive)
        own = tl.exp2(positive - shift)
        # p_0 k - k is written as -(p_1 + ...) k: no cancellation where the positive dominates.
        negatives = tl.sum(tl.exp2(shifts - shift) * totals, 0)
        total = own + negatives
        weighted = -negatives * k
        for first in range(0, S, CHUNK):
            piece = first + tl.arange(0, CHUNK)
            factor = tl.load(shift_ptr + n * S + piece, mask=piece < S, other=float("-inf"))
            pointer = weighted_ptr + (piece.to(tl.int64)[:, None] * N + n) * C + column[None, :]
            valid = (piece < S)[:, None] & (column < C)[None, :]
            planes = tl.load(pointer, mask=valid, other=0.0)
            weighted += tl.sum(tl.exp2(factor - shift)[:, None] * planes, 0)
        dq = weighted / total * gradient_scale
        loss = (shift + tl.log2(total) - positive) * 0.6931471805599453
        # Small losses by the series of log(1 + x): the difference above keeps none of their digits.
        x = negatives / own
        loss = tl.where(x < 0.03, x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25))), loss)
        # An infinite queue entry can leave the loss finite (its logit is -inf), never the gradient.
        tl.store(losses_ptr + n, loss + 0.0 * tl.sum(dq, 0))
        tl.store(rank_ptr + n, tl.sum(above, 0).to(tl.int64))
        tl.store(dq_ptr + n * C + column, dq, mask=column < C)
    elif ENQUEUE:
        _enqueue(n - N, keys_ptr, queue, queue_ptr, cursor_ptr, M, K, C, CHUNK, BLOCK_C)
