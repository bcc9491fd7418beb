"""How fast loader and step are on this machine, and which of them limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from fastmoco.config import Config, ConfigError
from fastmoco.data.batch import Batch
from fastmoco.data.decode import BadImage, decode
from fastmoco.data.inspect.rate import FOREVER, puller, rate
from fastmoco.data.loader import build_loader
from fastmoco.data.pixels.deep import decode_deep
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import read_sample
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.source import Source
from fastmoco.data.table import Int64
from fastmoco.doctor.findings import CPU_PIXELS, Line
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step, compile_encoders
from fastmoco.method.memory_bank import allocate_bank
from fastmoco.method.moco import build_moco

# Seconds for each of about five measurements.
BUDGET_S = 4.0


# On the CPU a batch of a recipe would take minutes; speed per image hardly depends on it.
CPU_BATCH = 64


def storage(source: Source, config: Config) -> Iterator[Line]:
    """How fast one thread reads and decodes images, spread over the whole set."""
    count, rule = len(source.sizes), PixelRule.of(config.data)
    samples = [count * i // 256 for i in range(256)] if count > 256 else list(range(count))
    read_s = decode_s = 0.0
    size = done = bad = 0
    for sample in samples:
        began = time.perf_counter()
        try:
            data = read_sample(source, sample)
            read_s += time.perf_counter() - began
            began = time.perf_counter()
            decode_deep(data, rule) if rule.float_views else decode(data, rule)
        except BadImage:
            bad += 1
            continue
        decode_s += time.perf_counter() - began
        size, done = size + len(data), done + 1
        if read_s + decode_s > BUDGET_S:
            break
    if not done:
        raise ConfigError("None of the images that were tried can be read: check data.root.")
    yield "disk", f"{size / read_s / 2**20:.0f} MiB/s, {done / read_s:.0f} files/s on one thread"
    yield "decode", f"{done / decode_s:.0f} images/s on one thread (PIL); {bad} of {done + bad} bad"


def speed(config: Config, world: World) -> Iterator[Line]:
    """Images per second of loader and step, each by itself, and which of them will limit."""
    if world.device.type == "cpu":
        config = _small_batch(config)
    batch = config.optim.global_batch_size
    micro = batch // config.optim.accumulate
    samples = config.data.synthetic_samples
    if config.data.source != "synthetic":
        samples = len(open_source(config).sizes)
    device = _step_speed(config, world, samples)
    compiled = compile_encoders(config, world.device)
    how = ", not compiled as the run's will be" if compiled else ""
    yield "step", f"{device:.1f} images/s in batches of {batch}, images on the device already{how}"
    if config.data.source == "synthetic":
        return
    with build_loader(config, device=world.device, listed=False) as loader:
        delivered = rate(puller(loader), micro, world.device, BUDGET_S)
        yield "loader", f"{delivered:.1f} images/s with nothing else to do; {loader.description}"
    yield "verdict", _verdict(delivered, device, world.device, compiled)
    if world.device.type == "cpu" and torch.get_num_threads() > 1:
        yield "threads", _best_threads(config, world)


def _small_batch(config: Config) -> Config:
    """The same run with a batch that a CPU steps through in about a second."""
    batch = CPU_BATCH
    while batch > 8 and batch * config.augment.image_size**2 > CPU_PIXELS:
        batch //= 2
    if config.optim.global_batch_size <= batch:
        return config
    few = replace(config.optim, global_batch_size=batch, accumulate=1)
    group = min(config.moco.bn_group_size or batch, batch)
    group = group if batch % group == 0 else batch
    return replace(config, optim=few, moco=replace(config.moco, bn_group_size=group))


def _best_threads(config: Config, world: World) -> str:
    """The step fed by the loader, with all compute threads and with one core left to the loader.

    OpenMP threads meet after every operation and wait spinning: a thread that shares its core with
    a loader process holds up all others (rows of
    bench/results/threads.jsonl).
    """
    everyone = torch.get_num_threads()
    micro = config.optim.global_batch_size // config.optim.accumulate
    speeds = {}
    for threads in (everyone, everyone - 1):
        torch.set_num_threads(threads)
        with build_loader(config, device=world.device, listed=False) as loader:
            batches = loader.batches(0, FOREVER)
            once = _stepper(config, world, batches, loader.num_samples)
            speeds[threads] = rate(once, micro, world.device, BUDGET_S)
    torch.set_num_threads(everyone)
    best = max(speeds, key=lambda threads: speeds[threads])
    told = ", ".join(f"{n}: {speed:.1f} images/s" for n, speed in speeds.items())
    advice = "" if best == everyone else f"; start training with OMP_NUM_THREADS={best}"
    return f"fed by the loader, by compute threads: {told}{advice}"


def _verdict(loader: float, step: float, device: torch.device, compiled: bool) -> str:
    """Which limits. `compiled`: the run compiles its step, for which nobody waits here."""
    if device.type == "cpu":  # both want the same cores, so their times add up at worst
        together = 1 / (1 / loader + 1 / step)
        share = 100 * (1 - together / step)
        limit = "loader" if loader < step else "step"
        return (
            f"the {limit} limits; they share the cores, so expect {together:.1f} to "
            f"{min(loader, step):.1f} images/s, up to {share:.0f} % below the step alone"
        )
    if loader > 1.1 * step and compiled:
        return (
            f"the loader is {loader / step:.1f} times as fast as this step; the compiled one is "
            "faster, and data_wait_percent in the run's metrics.jsonl tells who waits"
        )
    if loader > 1.1 * step:
        return f"the device limits; the loader is {loader / step:.1f} times as fast"
    slow = 100 * (1 - loader / step)
    return (
        f"the loader limits: the device would idle {max(slow, 0):.0f} % of the time; raise "
        "data.workers or data.threads, or store smaller images"
    )


def _step_speed(config: Config, world: World, samples: int) -> float:
    noise = replace(config, data=replace(config.data, source="synthetic"))
    batches = build_loader(noise, device=world.device).batches(0, FOREVER)
    images = config.optim.global_batch_size // config.optim.accumulate
    # Noise has no sample numbers, which a memory bank asks for.
    numbered = (
        replace(one, replaced=_numbers(n, images, samples)) for n, one in enumerate(batches)
    )
    return rate(_stepper(config, world, numbered, samples), images, world.device, BUDGET_S)


def _numbers(micro_step: int, images: int, samples: int) -> Int64:
    """(images, 2): the next ones of all samples, again and again, as a loader says of good ones."""
    numbers = (micro_step * images + np.arange(images)) % samples
    return np.stack([numbers, numbers], axis=1)


def _stepper(
    config: Config, world: World, batches: Iterator[Batch], samples: int
) -> Callable[[], object]:
    """A function that trains on one micro-batch; its first calls are slower.

    samples: how many the set has. Raises `ConfigError` as `allocate_bank`.
    """
    moco = build_moco(config, config.bn_group_size(world.size), world.device)
    allocate_bank(config, moco, samples)
    step = build_step(config, moco, world, compile_encoders=False)
    number = 0

    def once() -> None:
        nonlocal number
        step([next(batches)], number)
        number += 1

    return once
