"""What this machine has, what a run will use and why, and whether both work.

A finding is a line: a name and a sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.data.backends.choose import has_dali, missing_dali, why_no_nvjpeg
from fastmoco.data.loader import build_loader
from fastmoco.machine import limits
from fastmoco.machine.host import cores, memory_bytes, settle
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.build import compile_encoders, compile_reason
from fastmoco.method.shuffle_bn import build_shuffle
from fastmoco.network.batchnorm import norm_choice
from fastmoco.network.convolution import convolution_choice
from fastmoco_kernels import processor
from fastmoco_kernels.preflight import short_preflight

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow")


DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


# Pixels of a batch there: 64 images of 96 pixels, 8 of 224.
CPU_PIXELS = 64 * 96**2


# Largest mean difference, in gray levels, between two executors of one augmentation table.
SAME_VIEWS = 4.0


Line = tuple[str, str]


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
        state = (
            "with its CUDA extensions"
            if compiled
            else "not installed (only for optim.name apex_sgd)"
        )
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
    shared, files = limits.shared_memory(), limits.files_left(0)
    granted = "no limit known" if shared is None else f"{shared / 2**30:.2g} GiB"
    yield "limits", f"shared memory for batches {granted}, open files {files or 'without a limit'}"
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
    yield from loader_choices(config, world.device)


def loader_choices(config: Config, device: torch.device) -> Iterator[Line]:
    """Who can decode here, and what is lost where no GPU does."""
    decoders = "DALI installed" if has_dali() else "DALI not installed"
    if device.type == "cuda":
        decoders += f", nvJPEG: {why_no_nvjpeg(device) or 'decodes here'}"
    yield "loader", f"{decoders}; data.backend {config.data.backend}"
    if lost := missing_dali(config, device):
        yield "loader", lost


def check_views(config: Config, device: torch.device) -> Line:
    """The loader of this run against PIL on the same rows of the augmentation table."""
    few = replace(config, optim=replace(config.optim, global_batch_size=4, accumulate=1))
    views, used = [], []
    for backend in (config.data.backend, "pil"):
        at = device if backend != "pil" else torch.device("cpu")
        chosen = replace(few, data=replace(few.data, backend=backend, workers=1))
        with build_loader(chosen, device=at, listed=False) as loader:
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
