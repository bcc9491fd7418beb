"""Images per second, where they go, and who is faster: `python -m bench.throughput --config FILE`.

Takes the options of `fastmoco.train`. In one run and in turns it times the step on images that are
on the device already, the bare encoder (supervised forward and backward plus one forward: the
ceiling of the step) and the published step, on the CPU also with our allocator setting, which is
worth much to it; then the loader alone, and the step fed by the loader. Every window ends with a
device synchronization; p20, p50 and p80 are over windows. Nothing but the device that torch finds
differs between CPU and CUDA.

--only takes some of loader, step, end_to_end, encoder, official, official_kept, and three that run
only when they are named: silent, the step while a host synchronization is an error, captured, the
same as a CUDA graph, and cudnn_benchmark, the same with algorithms that cuDNN chose by timing them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.measure.contest import Contestant, Result
from bench.measure.program import Options, chosen, command, compete, parser
from bench.measure.rows import Row, case_of, quantiles
from fastmoco.config import ConfigError, dump, flatten
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine.environment import LIBGOMP_SPIN_COUNT

# The published code leaves libgomp's waiting as it is; `fastmoco` does not.
PUBLISHED = {"GOMP_SPINCOUNT": LIBGOMP_SPIN_COUNT}
STEPS = "bench.steps.contestants"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("loader", f"{STEPS}:loader_alone"),
        Contestant("step", f"{STEPS}:our_step"),
        Contestant("end_to_end", f"{STEPS}:end_to_end"),
        Contestant("encoder", f"{STEPS}:bare_encoder"),
        Contestant("official", f"{STEPS}:official_step", {}, PUBLISHED),
        Contestant("official_kept", f"{STEPS}:official_step", {"kept_memory": True}, PUBLISHED),
        Contestant("silent", f"{STEPS}:silent_step"),
        Contestant("captured", f"{STEPS}:silent_step", {"cuda_graph": "on"}),
        Contestant("cudnn_benchmark", f"{STEPS}:silent_step", {"cudnn_benchmark": True}),
    )
}
NEEDS_CUDA = {"captured", "cudnn_benchmark"}
ONLY_NAMED = {"silent", *NEEDS_CUDA}
FED = ("loader", "end_to_end")
# On the CPU it runs with them: the rate that their FLOPs are compared with.
PRODUCT = Contestant("product", f"{STEPS}:matrix_product")
RATIOS = {
    "our step / published step": ("step", "official"),
    "our step / published step, freed memory kept": ("step", "official_kept"),
    "our step / bare encoder": ("step", "encoder"),
    "CUDA graph / launched by the host": ("captured", "silent"),
    "cuDNN's algorithms timed / by its rules": ("cudnn_benchmark", "silent"),
}


def named(own: Options) -> list[str]:
    """The contestants. Raises `ConfigError` for unknown ones, and where none is left."""
    out = set(FED) if own.config.data.source == "synthetic" else set()
    if own.device.type == "cpu":
        out |= NEEDS_CUDA
    if not own.only:
        out |= ONLY_NAMED
        if own.device.type == "cuda":  # its tensors do not come from malloc
            out |= {"official_kept"}
    found = [name for name in chosen(own.only, list(CONTESTANTS)) if name not in out]
    if not found:
        raise ConfigError(
            f"--only {own.only}: synthetic data has no loader, for which set data.source, and the "
            "CPU neither CUDA graphs nor cuDNN."
        )
    return found


def measure(own: Options) -> dict[str, Result]:
    """Run the contest of those that were named."""
    config, names = own.config, named(own)
    text = dump(config if config.data.source == "synthetic" else resolve_folders(config))
    racing = [CONTESTANTS[name] for name in names]
    racing += [PRODUCT] if own.device.type == "cpu" and set(names) - set(FED) else []
    racing = [replace(one, arguments={**one.arguments, "config": text}) for one in racing]
    results = compete(own, [one for one in racing if one.name not in FED])
    # A loader works ahead while others have their turn, so whoever it feeds runs by itself.
    for one in racing:
        if one.name in FED:
            results |= compete(own, [one], warmup=own.steps + config.data.prefetch + 2)
    return {one.name: results[one.name] for one in racing}


def ratios_of(results: dict[str, Result]) -> dict[str, list[float]]:
    """p20, p50, p80 over turns of every ratio of speeds that the contestants allow.

    Windows of one turn ran right after each other, so their ratio is steadier than either speed.
    """
    found = {}
    for title, pair in RATIOS.items():
        if all(name in results for name in pair):
            turns = zip(*(results[name].windows for name in pair), strict=True)
            speeds = [(b.seconds / b.steps) / (a.seconds / a.steps) for a, b in turns]
            found[title] = quantiles(speeds)
    return found


def share_of(product: Result | None, result: Result) -> Row:
    """Field of a row: the share of the rate of fp32 products that a step reaches, in percent.

    FLOPs are nominal, as torch counts them: padding is multiplied, Winograd saves nothing.
    """
    if product is None or "gflop_per_step" not in result.facts:
        return {}
    rates = [
        quantiles([one.facts["gflop_per_step"] * w.steps / w.seconds for w in one.windows])[1]
        for one in (result, product)
    ]
    return {"product_share_percent": round(100 * rates[0] / rates[1], 1)}


@command(parser("throughput", __doc__))
def main(own: Options) -> Iterator[list[Row]]:
    """One row per contestant; rows of one contest share their ratios."""
    results = measure(own)
    shared: dict[str, Any] = {
        "benchmark": "throughput",
        "case": case_of(own.config),
        "ratios": ratios_of(results),
        "config": flatten(own.config),
    }
    images = own.config.optim.global_batch_size
    product = results.pop(PRODUCT.name, None)
    yield [
        {**shared, "contestant": name, **one.row(images), **share_of(product, one)}
        for name, one in results.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
