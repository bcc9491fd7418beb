"""Compare every op with its reference on this device, before a run.

    results = preflight.check(torch.device("cuda"))
    for result in results:
        if not result.passed:
            launch.use_reference(result.op, result.detail)

The truth is the float64 reference on the same inputs. The bounds are wide enough for any rounding
that the dtype allows and far too narrow for a wrong mask, scale or order of reads and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco_kernels import launch, reference
from fastmoco_kernels.ema import ema_
from fastmoco_kernels.info_nce import info_nce, info_nce_enqueue
from fastmoco_kernels.launch import HAS_TRITON
from fastmoco_kernels.network.batch_norm import batch_norm_act
from fastmoco_kernels.network.max_pool import max_pool
from fastmoco_kernels.sgd_ema import sgd_ema_
from fastmoco_kernels.views import crop_resize_reference, photometric_reference
from fastmoco_kernels.views.crop_resize import crop_resize
from fastmoco_kernels.views.photometric import photometric

# Largest relative error of the gradient by dtype of the inputs; losses are float32 sums.
GRADIENT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LOSS = 1e-3
UPDATE = 1e-5


class Result(NamedTuple):
    """One op on one set of inputs."""

    op: str
    case: str
    passed: bool
    detail: str
    seconds: float
    """Wall time with compilation."""


def _features(n: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [normalize(torch.randn(r, c, generator=generator), dim=1) for r in (n, n, k)]
    rows[1] = normalize(rows[0] + 0.7 * rows[1], dim=1)
    return [r.to(device, dtype) for r in rows]


def _check_loss(dtype: torch.dtype, device: torch.device, n: int, c: int, k: int) -> str:
    q, key, queue = _features(n, c, k, dtype, device)
    losses, rank, dq = reference.info_nce(q.double(), key.double(), queue.double(), 0.2)
    q.requires_grad_(True)
    out = info_nce(q, key, queue, 0.2)
    (grad,) = torch.autograd.grad(out.loss, q)
    loss_error = float((out.losses - losses).abs().max())
    grad_error = float((grad - dq).norm() / dq.norm())
    wrong = int(((out.rank - rank).abs() > 1).sum())
    passed = loss_error < LOSS and grad_error < GRADIENT[dtype] and wrong == 0
    return (
        f"{'' if passed else 'WRONG '}loss {loss_error:.1e} gradient {grad_error:.1e} rank {wrong}"
    )


def _check_enqueue(dtype: torch.dtype, device: torch.device, n: int, c: int, k: int) -> str:
    q, key, queue = _features(n, c, k, dtype, device)
    losses, _, _ = reference.info_nce(q.double(), key.double(), queue.double(), 0.2)
    pointer = torch.tensor([k - n // 2], device=device)
    expected, expected_pointer = queue.clone(), pointer.clone()
    reference.enqueue_(key, expected, expected_pointer)
    out = info_nce_enqueue(q, key, key, queue, pointer, 0.2)
    loss_error = float((out.losses - losses).abs().max())
    same = torch.equal(queue, expected) and torch.equal(pointer, expected_pointer)
    passed = same and loss_error < LOSS
    return (
        f"{'' if passed else 'WRONG '}loss {loss_error:.1e} queue {'equal' if same else 'differs'}"
    )


def _lists(device: torch.device, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((1,), (4097,), (64, 3, 7, 7), (70000,))
    return [[torch.randn(s, generator=generator).to(device) for s in sizes] for _ in range(count)]


def _compare(got: list[Tensor], want: list[Tensor]) -> str:
    error = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    return f"{'' if error < UPDATE else 'WRONG '}largest difference {error:.1e}"


def _check_ema(device: torch.device) -> str:
    targets, sources = _lists(device, 2)
    want = [t.double() for t in targets]
    reference.ema_(want, [s.double() for s in sources], 0.99)
    ema_(targets, sources, 0.99)
    return _compare(targets, want)


def _check_sgd_ema(device: torch.device) -> str:
    lists = _lists(device, 4)
    want = [[t.double() for t in tensors] for tensors in lists]
    lr = torch.tensor(0.1, device=device)
    reference.sgd_ema_(want[0], want[1], want[2], want[3], lr.double(), 0.9, 1e-3, 0.99)
    sgd_ema_(*lists, lr=lr, momentum=0.9, weight_decay=1e-3, ema_momentum=0.99)
    return _compare(lists[0] + lists[2] + lists[3], want[0] + want[2] + want[3])


def _check_batch_norm(dtype: torch.dtype, device: torch.device, added: bool) -> str:
    """Output, gradients and running statistics of two groups, 143 rows of 72 channels each."""
    generator = torch.Generator().manual_seed(3)
    images = (2 * torch.randn(3, 2, 72, 13, 11, generator=generator) + 1).to(device, dtype)
    x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in images)
    tensors = [x, torch.linspace(-2, 1, 72), torch.linspace(0.5, 1, 72), residual]
    counter, found = torch.tensor(1, device=device), []
    for kind in (None, torch.float64):
        leaves = [t.detach().to(device, kind).requires_grad_() for t in tensors[: 3 + added]]
        running = [torch.full((72,), value, dtype=kind, device=device) for value in (0.5, 2.0)]
        last = (0.1, 1e-5, 2, True)
        first = (leaves[0], leaves[3] if added else None, leaves[1], leaves[2])
        if kind is None:
            y = batch_norm_act(*first, running[0], running[1], counter, *last)
        else:
            y = reference.batch_norm_act(*first, running[0], running[1], True, *last)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)), *running])
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    passed = error < GRADIENT[dtype] and int(counter) == 2
    return f"{'' if passed else 'WRONG '}relative error {error:.1e}"


def _check_max_pool(dtype: torch.dtype, device: torch.device) -> str:
    generator = torch.Generator().manual_seed(2)
    # Small whole numbers: many ties, and sums of gradients that every dtype holds exactly.
    x = torch.randint(-2, 3, (2, 64, 13, 16), generator=generator).to(device, dtype)
    y, taps = reference.max_pool(x.double(), 3, 2, 1)
    dy = torch.randint(-2, 3, y.shape, generator=generator).to(device, dtype)
    want = reference.max_pool_backward(dy.double(), taps, 13, 16, 3, 2, 1)
    out = max_pool(x.requires_grad_(True), 3, 2, 1)
    (dx,) = torch.autograd.grad(out, x, dy)
    return _compare([out.detach(), dx], [y, want])


def _check_photometric(device: torch.device) -> str:
    """Two views through every operation, mirrored and blurred, against the reference: equal."""
    generator = torch.Generator().manual_seed(4)
    views = torch.randint(0, 256, (2, 37, 37, 3), dtype=torch.uint8, generator=generator)
    # Boxes of radius 0.5 and 1.25; brightness, contrast, hue, saturation, gray. See the op's rows.
    boxes = [[0.0, 2**23, 2**22, 1], [1.0, 4793490, 1198372, 1]]
    slots = [[1, 1.3, 2, 0.7, 4, 200, 3, 1.4, 0, 0], [3, 0.8, 2, 1.2, 4, 20, 1, 0.9, 3, 0]]
    rows = [[0.0] * 4 + [float(i), *boxes[i], *map(float, slots[i])] for i in (0, 1)]
    want = photometric_reference.photometric(views, torch.tensor(rows))
    return _equal(photometric(views.to(device), torch.tensor(rows, device=device)), want)


def _check_crop_resize(device: torch.device) -> str:
    """Boxes that shrink, grow, and whose height comes first, of planes and of colours side by side.

    The weights are the only floats, and a rounding of one shows in one pixel of a million.
    """
    generator = torch.Generator().manual_seed(5)
    planes = torch.randint(0, 256, (3, 150, 90), dtype=torch.uint8, generator=generator)
    colours = torch.randint(0, 256, (40, 61, 3), dtype=torch.uint8, generator=generator)
    pictures, which = [planes, colours.permute(2, 0, 1)], torch.tensor([0, 0, 1, 1])
    boxes = torch.tensor([[3, 5, 147, 60], [70, 1, 33, 88], [0, 0, 40, 61], [39, 60, 1, 1]])
    want = crop_resize_reference.crop_resize(pictures, which, boxes, 37)
    return _equal(crop_resize([p.to(device) for p in pictures], which, boxes, 37), want)


def _equal(got: Tensor, want: Tensor) -> str:
    wrong = int((got.cpu() != want).sum())
    return f"{'WRONG ' if wrong else ''}{wrong} of {want.numel()} values differ"


def check(device: torch.device | str) -> list[Result]:
    """Run every op on the device. One that raises has failed, with the error as its detail."""
    device = torch.device(device)
    cases: list[tuple[str, str, Callable[[], str]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in ((64, 128, 4096), (5, 33, 1001)):
            name = f"{str(dtype).removeprefix('torch.')} N, C, K = {shape}"
            cases.append(("info_nce", name, partial(_check_loss, dtype, device, *shape)))
            cases.append(("info_nce_enqueue", name, partial(_check_enqueue, dtype, device, *shape)))
        for added in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}{' and addition' * added}"
            cases.append(("batch_norm", name, partial(_check_batch_norm, dtype, device, added)))
    cases.append(("ema_", "float32", partial(_check_ema, device)))
    cases.append(("sgd_ema_", "float32", partial(_check_sgd_ema, device)))
    cases.extend(
        ("max_pool", str(dtype)[6:], partial(_check_max_pool, dtype, device)) for dtype in GRADIENT
    )
    cases.append(("photometric", "two views", partial(_check_photometric, device)))
    cases.append(("crop_resize", "two pictures", partial(_check_crop_resize, device)))
    return [_run(*case) for case in cases]


def _run(op: str, case: str, body: Callable[[], str]) -> Result:
    start = time.perf_counter()
    try:
        detail = body()
    except Exception as error:  # whatever the compiler or the driver raises is the finding
        detail = f"WRONG {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return Result(op, case, not detail.startswith("WRONG"), detail, seconds)


def wrong_ops(device: torch.device) -> dict[str, str]:
    """Every op that differs from its float64 reference on `device`, with the first case of it.

    Changes nothing. Kernels that are not cached are compiled first, which on CUDA takes most of
    the time. On CUDA without triton every op is in it.
    """
    failed: dict[str, str] = {}
    if device.type == "cuda" and not HAS_TRITON:
        failed = dict.fromkeys(launch.OPS, "triton is not installed")
    for result in check(device):
        if not result.passed:
            failed.setdefault(result.op, f"{result.case}: {result.detail}")
    return failed


def short_preflight(device: torch.device) -> list[str]:
    """Compare every fused op with its float64 reference on `device`.

    On CUDA an op that is wrong runs by its reference from now on, in this process. Returns one
    sentence for each such op, to be shown as a warning; an empty list when all are right.
    """
    cuda = device.type == "cuda"
    if cuda and not HAS_TRITON:
        return [launch.NO_TRITON]
    failed = wrong_ops(device)
    if cuda:
        for op, reason in failed.items():
            launch.use_reference(op, reason)
    consequence = (
        "its eager reference runs instead: right, but slower"
        if cuda
        else "do not trust this installation of torch"
    )
    return [f"{op} is wrong on {device} ({why}); {consequence}." for op, why in failed.items()]
