"""Op by op: the fused ops beside the official formulation, torch.compile of it and other libraries.

    python -m bench.kernels [--device cuda] [--only ema] [--threads 2] [--publish]

`official` is what the published MoCo code does: einsum, cat, division, cross entropy on a clone of
the queue, backward; a loop over parameters that allocates each new one; torch.optim.SGD. It takes
no top-5, which the official step does and the fused op includes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.measure.program import Options, chosen, command, parser
from bench.measure.rows import Row
from bench.races import race
from bench.races.convolutions import LAYERS, PARTS, convolution_race
from bench.races.crop_resize import crop_resize_race
from bench.races.layers import CPU_NORMS, CUDA_NORMS, batch_norm_race, max_pool_race
from bench.races.loss import enqueue_race, loss_race
from bench.races.photometric import photometric_race
from bench.races.race import Race
from bench.races.updates import ema_race, sgd_ema_race
from fastmoco.machine.host import keep_freed_memory
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from fastmoco_kernels.launch import HAS_TRITON, triton
from fastmoco_kernels.network import batch_norm_cpu

LOSSES = ((256, torch.float32), (256, torch.bfloat16), (32, torch.float32))
Cases = list[Callable[[], Race]]


def races(device: torch.device) -> dict[str, Cases]:
    """All cases by op that this device has a kernel for, built when they are run."""
    found: dict[str, Cases] = {
        "info_nce": [partial(loss_race, n, 128, 65536, dtype, device) for n, dtype in LOSSES],
        "info_nce_enqueue": [partial(enqueue_race, 256, 128, 65536, device)],
        "ema": [partial(ema_race, device)],
        "sgd_ema": [partial(sgd_ema_race, device)],
    }
    if device.type == "cuda":
        found["batch_norm"] = [partial(batch_norm_race, *case, device) for case in CUDA_NORMS]
        found["max_pool"] = [partial(max_pool_race, 256, 64, 112, device)]
        # Two views of 256 images, or of 32.
        found["photometric"] = [partial(photometric_race, n, 224, device) for n in (512, 64)]
        found["crop_resize"] = [partial(crop_resize_race, n, 224, device) for n in (256, 32)]
        return found
    if not batch_norm_cpu.reason():
        found["batch_norm"] = [partial(batch_norm_race, *case, device) for case in CPU_NORMS]
    if not convolution_cpu.reason():
        gradient = partial(convolution_race, "weight gradient", torch.bfloat16)
        found["weight_gradient"] = [partial(gradient, *sizes) for sizes in LAYERS if sizes[2] > 1]
    if not convolution_fp32_cpu.reason():
        cases = [(part, torch.float32, *sizes) for sizes in LAYERS for part in PARTS]
        found["convolution"] = [partial(convolution_race, *case) for case in cases]
    return found


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
    torch.set_num_threads(own.threads)
    keep_freed_memory()  # as in training: otherwise mapping it would be half of what is timed
    for build in (build for op in chosen(own.only, list(known)) for build in known[op]):
        asked = build()
        timings = race.run(asked, own.device, own.windows)
        if least := asked.case.get("least_bytes"):
            for numbers in timings.values():
                numbers |= traffic(least, numbers["p50_ms"], own.device)
        case = asked.case | {"device": own.device.type}
        shared = {"benchmark": asked.op, "case": case}
        yield [{**shared, "contestant": way, **found} for way, found in timings.items()]


if __name__ == "__main__":
    sys.exit(main())
