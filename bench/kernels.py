"""Op by op: the fused ops beside the official formulation, torch.compile of it and other libraries.

    python -m bench.kernels [--device cuda] [--only ema] [--threads 2] [--publish]

`official` is what the published MoCo code does: einsum, cat, division, cross entropy on a clone of
the queue, backward; a loop over parameters that allocates each new one; torch.optim.SGD. It takes
no top-5, which the official step does and the fused op includes. The layers of the encoder are in
`bench.races.layers` and `norm`. N local batch, C dimension, K queue length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.measure.contest import Race, race
from bench.measure.program import Options, chosen, command, parser
from bench.measure.rows import Row
from bench.races.crop_resize import crop_resize_race
from bench.races.layers import batch_norm_race, cpu_races
from bench.races.loss import enqueue_race, loss_race
from bench.races.max_pool import max_pool_race
from bench.races.norm import CASES, group_batch_norm_race
from bench.races.photometric import photometric_race
from bench.races.updates import ema_race, sgd_ema_race
from fastmoco_kernels.launch import HAS_TRITON, triton


def races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """All cases by op, built when they are run."""
    losses = [(256, torch.float32), (256, torch.bfloat16), (32, torch.float32)]
    norms = [(32, 64, 112, False), (32, 256, 56, True), (32, 256, 14, False), (32, 1024, 14, True)]
    on_cuda = device.type == "cuda"
    return {
        "info_nce": [partial(loss_race, n, 128, 65536, dtype, device) for n, dtype in losses],
        "info_nce_enqueue": [lambda: enqueue_race(256, 128, 65536, device)],
        "ema": [lambda: ema_race(device)],
        "sgd_ema": [lambda: sgd_ema_race(device)],
        "batch_norm": [partial(group_batch_norm_race, *case, device) for case in CASES]
        if on_cuda
        else [partial(batch_norm_race, *sizes, device) for sizes in norms],
        **({"max_pool": [partial(max_pool_race, 256, 64, 112, device)]} if on_cuda else {}),
        # Two views of 256 images, or of 32. On the CPU both ways are the same code.
        **(
            {
                "photometric": [partial(photometric_race, n, 224, device) for n in (512, 64)],
                "crop_resize": [partial(crop_resize_race, n, 224, device) for n in (256, 32)],
            }
            if on_cuda
            else {}
        ),
        **cpu_races(device),
    }


PARSER = parser("kernels", __doc__, steps=False)
PARSER.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
PARSER.add_argument("--threads", type=int, default=torch.get_num_threads())


def traffic(least_bytes: int, p50_ms: float, device: torch.device) -> Row:
    """Fields of a row whose case knows what must be moved at least: its rate at the median.

    With the memory of the device known, `bound_ms` is *modelled*: what that traffic takes.
    """
    found: Row = {"gb_per_s": round(least_bytes / p50_ms / 1e6, 1)}
    if device.type == "cuda" and HAS_TRITON:
        peak = triton.testing.get_dram_gbps(device.index or 0)
        found["bound_ms"] = round(least_bytes / peak / 1e6, 4)
    return found


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """Race what was asked for: one row per way."""
    known = races(own.device)
    names = chosen(own.only, list(known))
    torch.set_num_threads(own.threads)
    for build in (build for op in names for build in known[op]):
        op, case, ways = build()
        timings = race(ways, own.device, own.windows)
        if least := case.get("least_bytes"):
            for numbers in timings.values():
                numbers |= traffic(least, numbers["p50_ms"], own.device)
        shared = {"benchmark": op, "case": case}
        yield [{**shared, "contestant": way, **found} for way, found in timings.items()]


if __name__ == "__main__":
    sys.exit(main())
