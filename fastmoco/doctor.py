"""What this machine has, what a run will use and why, and what limits it: `-m fastmoco.doctor`.

Takes the options of `fastmoco.train`; under torchrun it also tries the exchange between ranks.
Training runs the short form, `short_preflight`, at its start. Takes less than a minute.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata

import torch
from torch import Tensor

from fastmoco import distributed
from fastmoco.banner import compile_encoders, compile_reason
from fastmoco.batchnorm import norm_choice
from fastmoco.config import Config, ConfigError, check, parse
from fastmoco.convolution import convolution_choice
from fastmoco.data.folders import resolve_folders
from fastmoco.data.header import BadImage, decode
from fastmoco.data.loader import Batch, Loader, build_loader, has_dali, missing_dali
from fastmoco.data.reader import read_sample
from fastmoco.data.sources import Source, open_source
from fastmoco.distributed import World
from fastmoco.host import cores, memory_bytes, settle
from fastmoco.machine.precision import choose_precision
from fastmoco.moco import build_moco
from fastmoco.shuffle import build_shuffle
from fastmoco.step import build_step
from fastmoco_kernels import fallback, preflight, processor
from fastmoco_kernels.launch import HAS_TRITON

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow")
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
# Seconds for each of about five measurements.
BUDGET_S = 4.0
# On the CPU a batch of a recipe would take minutes; speed per image hardly depends on it.
CPU_BATCH = 64
# Pixels of a batch there: 64 images of 96 pixels, 8 of 224.
CPU_PIXELS = 64 * 96**2
# Largest mean difference, in gray levels, between two executors of one augmentation table.
SAME_VIEWS = 4.0
FOREVER = 10**9

Line = tuple[str, str]


def short_preflight(device: torch.device) -> list[str]:
    """Compare every fused op with its float64 reference on `device`, in a few seconds.

    On CUDA an op that is wrong runs by its reference from now on. Returns one sentence for each
    such op, to be shown as a warning; an empty list when all are right.
    """
    failed: dict[str, str] = {}
    for result in preflight.check(device):
        if not result.passed:
            failed.setdefault(result.op, f"{result.case}: {result.detail}")
    if device.type == "cuda":
        for op, reason in failed.items():
            fallback.use_reference(op, reason)
    found = [fallback.NO_TRITON] if device.type == "cuda" and not HAS_TRITON else []
    consequence = (
        "its eager reference runs instead: right, but slower"
        if device.type == "cuda"
        else "do not trust this installation of torch"
    )
    return found + [
        f"{op} is wrong on {device} ({why}); {consequence}." for op, why in failed.items()
    ]


def versions() -> Iterator[Line]:
    """Python, the packages that matter, and optional accelerators."""
    found = [f"Python {platform.python_version()}"]
    found += [f"{name} {_version(name) or 'not installed'}" for name in PACKAGES]
    dali = [f"{name} {version}" for name in DALI_PACKAGES if (version := _version(name))]
    found += dali or ["DALI not installed"]
    yield "versions", ", ".join(found)
    apex = importlib.util.find_spec("apex") is not None
    compiled = importlib.util.find_spec("amp_C") is not None
    if apex and not compiled:
        state = "a package of that name without NVIDIA's CUDA extensions: not used"
    else:
        state = "with its CUDA extensions" if compiled else "not installed (only optim.apex_*)"
    yield "apex", state


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def devices(world: World) -> Iterator[Line]:
    """Processors, GPUs and what connects them."""
    memory = memory_bytes()
    held = f"{memory / 2**30:.0f} GiB, " if memory else ""
    yield "cpu", f"{cores()} cores for this rank, {held}{_extension()}"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use: training runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        size = known.total_memory / 2**30
        yield "gpu", f"{index}: {known.name}, {size:.0f} GiB, sm_{known.major}{known.minor}"
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    yield "nccl", f"{nccl}; this run: {world.size} ranks, {world.backend}"
    yield "nvml", _nvml()


def _extension() -> str:
    bf16 = "in hardware" if processor.multiplies_bf16() else "emulated"
    return f"{processor.best()}, bf16 {bf16}"


def _nvml() -> str:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        limit = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        version = nvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # nvml reports every absence by an exception class of its own
        return f"not usable ({type(error).__name__})"
    return f"driver {version}, power limit of GPU 0: {limit:.0f} W"


def choices(config: Config, world: World) -> Iterator[Line]:
    """What a run with this configuration will use, and why."""
    cuda = world.device.type == "cuda"
    yield "host", settle(world.device).removeprefix("host").strip()
    precision = choose_precision(config.run.precision, world.device)
    yield "precision", str(precision)
    if precision.warning:
        yield "precision", f"note: {precision.warning}"
    where = "Triton kernels" if cuda else "ATen: there is no CUDA device for the Triton kernels"
    yield "kernels", where
    compiled = compile_encoders(config, world.device)
    reason = compile_reason(world.device) if config.run.compile == "auto" else "asked for"
    yield "compile", f"{'on' if compiled else 'off'} (run.compile {config.run.compile}: {reason})"
    yield "norm", norm_choice(world.device, compiled)
    yield "conv", convolution_choice(world.device, precision.name, compiled)
    strategy, group = config.shuffle_bn(world.size), config.bn_group_size(world.size)
    yield (
        "shuffle",
        f"{strategy} for {world.size} rank{'s' * (world.size > 1)}, BN groups of {group} samples",
    )
    dali = "installed" if has_dali() else "not installed"
    yield "loader", f"DALI {dali}; data.backend {config.data.backend}"
    if lost := missing_dali(config, world.device):
        yield "loader", lost


def storage(source: Source, config: Config) -> Iterator[Line]:
    """How fast one thread reads and decodes images, spread over the whole set."""
    count = len(source.sizes)
    samples = [count * i // 256 for i in range(256)] if count > 256 else list(range(count))
    read_s = decode_s = 0.0
    size = done = bad = 0
    for sample in samples:
        began = time.perf_counter()
        try:
            data = read_sample(source, sample)
            read_s += time.perf_counter() - began
            began = time.perf_counter()
            decode(data, config.data.max_pixels)
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


def check_views(config: Config, device: torch.device) -> Line:
    """The loader of this run against PIL on the same rows of the augmentation table."""
    few = replace(config, optim=replace(config.optim, global_batch_size=4, accumulate=1))
    views, used = [], []
    for backend in (config.data.backend, "pil"):
        at = device if backend != "pil" else torch.device("cpu")
        chosen = replace(few, data=replace(few.data, backend=backend, workers=1))
        with build_loader(chosen, device=at) as loader:
            batch = next(loader.batches(0, 1))
            views.append(torch.stack([batch.im_q, batch.im_k]).cpu().float())
            used.append(loader.backend)
    apart = float((views[0] - views[1]).abs().mean())
    verdict = "agrees with" if apart < SAME_VIEWS else "DIFFERS FROM"
    return "views", f"{used[0]} {verdict} PIL: {apart:.2f} gray levels on average, 8 views"


def check_exchange(world: World) -> Line:
    """Rows go through the all-to-all shuffle and must come home."""
    local = 2 * world.size + 1
    shuffle = build_shuffle("all_to_all", world=world, local=local, seed=0)
    first = world.rank * local
    images = torch.arange(first, first + local, device=world.device, dtype=torch.int64)
    indices = shuffle.indices(3).to(world.device)
    home = shuffle(_identity, shuffle.send(images[:, None], indices), indices)
    right = torch.equal(home.local[:, 0], images)
    everyone = torch.arange(world.size * local, device=world.device)
    right = right and torch.equal(home.gathered[:, 0], everyone)
    verdict = "every row came home" if right else "WRONG: rows were lost or exchanged"
    return "exchange", f"{verdict} ({world.size} rank{'s' * (world.size > 1)})"


def _identity(images: Tensor) -> Tensor:
    return images


def check_kernels(device: torch.device) -> Iterator[Line]:
    """Each op against its reference; the same that training does at its start."""
    began = time.perf_counter()
    wrong = short_preflight(device)
    seconds = time.perf_counter() - began
    if not wrong:
        yield "preflight", f"every op equals its float64 reference on {device} ({seconds:.1f} s)"
    for sentence in wrong:
        yield "preflight", f"WARNING: {sentence}"


def speed(config: Config, world: World) -> Iterator[Line]:
    """Images per second of loader and step, each by itself, and which of them will limit."""
    if world.device.type == "cpu":
        config = _small_batch(config)
    batch = config.optim.global_batch_size
    micro = batch // config.optim.accumulate
    device = _step_speed(config, world)
    yield "step", f"{device:.1f} images/s in batches of {batch}, images on the device already"
    if config.data.source == "synthetic":
        return
    with build_loader(config, device=world.device) as loader:
        delivered = _rate(_puller(loader), micro, world.device)
        yield "loader", f"{delivered:.1f} images/s with nothing else to do; {loader.description}"
    yield "verdict", _verdict(delivered, device, world.device)
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
    a loader process holds up all others (`python -m bench.threads`).
    """
    everyone = torch.get_num_threads()
    micro = config.optim.global_batch_size // config.optim.accumulate
    speeds = {}
    for threads in (everyone, everyone - 1):
        torch.set_num_threads(threads)
        with build_loader(config, device=world.device) as loader:
            batches = loader.batches(0, FOREVER)
            speeds[threads] = _rate(_stepper(config, world, batches), micro, world.device)
    torch.set_num_threads(everyone)
    best = max(speeds, key=lambda threads: speeds[threads])
    told = ", ".join(f"{n}: {speed:.1f} images/s" for n, speed in speeds.items())
    advice = "" if best == everyone else f"; start training with OMP_NUM_THREADS={best}"
    return f"fed by the loader, by compute threads: {told}{advice}"


def _verdict(loader: float, step: float, device: torch.device) -> str:
    if device.type == "cpu":  # both want the same cores, so their times add up at worst
        together = 1 / (1 / loader + 1 / step)
        share = 100 * (1 - together / step)
        limit = "loader" if loader < step else "step"
        return (
            f"the {limit} limits; they share the cores, so expect {together:.1f} to "
            f"{min(loader, step):.1f} images/s, up to {share:.0f} % below the step alone"
        )
    if loader > 1.1 * step:
        return f"the device limits; the loader is {loader / step:.1f} times as fast"
    slow = 100 * (1 - loader / step)
    return (
        f"the loader limits: the device would idle {max(slow, 0):.0f} % of the time; raise "
        "data.workers or data.threads, or store smaller images"
    )


def _step_speed(config: Config, world: World) -> float:
    noise = replace(config, data=replace(config.data, source="synthetic"))
    batches = build_loader(noise, device=world.device).batches(0, FOREVER)
    images = config.optim.global_batch_size // config.optim.accumulate
    return _rate(_stepper(config, world, batches), images, world.device)


def _stepper(config: Config, world: World, batches: Iterator[Batch]) -> Callable[[], object]:
    """A function that trains on one micro-batch; its first calls are slower."""
    moco = build_moco(config, config.bn_group_size(world.size), world.device)
    step = build_step(config, moco, world, compile_encoders=False)
    number = 0

    def once() -> None:
        nonlocal number
        step([next(batches)], number)
        number += 1

    return once


def _puller(loader: Loader) -> Callable[[], object]:
    batches = loader.batches(0, FOREVER)
    return lambda: next(batches)


def _rate(once: Callable[[], object], images: int, device: torch.device) -> float:
    """Images per second over about BUDGET_S seconds, after warm-up: two calls, or a slow one."""
    began = time.perf_counter()
    once()
    _wait(device)
    if time.perf_counter() - began < BUDGET_S:
        once()
        _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < BUDGET_S and count < 50:
        once()
        count += 1
    _wait(device)
    return count * images / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examine(config: Config, world: World) -> Iterator[Line]:
    """Every finding in the order in which it is made."""
    yield from versions()
    yield from devices(world)
    yield from choices(config, world)
    yield from check_kernels(world.device)
    yield check_exchange(world)
    if config.data.source != "synthetic":
        yield from storage(open_source(config), config)
        yield check_views(config, world.device)
    if world.size == 1:
        yield from speed(config, world)


def _shown(name: str, text: str) -> str:
    """A finding as a line, folded beside its name where a terminal would break it anywhere."""
    line = f"{name:10s}{text}"
    if not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(line, width, subsequent_indent=" " * 10, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a configuration that cannot train, 1 if a check found something wrong."""
    wrong = False
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, "fastmoco doctor")
        world = distributed.start(config.run.device, config.run.timeout_s)
        check(config, world.size)
        config = resolve_folders(config)
        for name, text in examine(config, world):
            wrong = wrong or any(word in text for word in ("WARNING", "WRONG", "DIFFERS"))
            if world.is_main:
                print(_shown(name, text), flush=True)
    except (ConfigError, ValueError) as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
