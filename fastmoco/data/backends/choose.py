"""Which backend makes the views: `data.backend`."""

from __future__ import annotations

import importlib.util
import sys

import torch

from fastmoco.config import Config, ConfigError
from fastmoco.data.backends.engine import Engine
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Reader
from fastmoco.machine.host import cores

# The extra of this project with DALI for the CUDA that torch was built with.
DALI_EXTRAS = {"12": "dali-cuda12", "13": "dali"}


def choose_backend(config: Config, device: torch.device) -> str:
    """`dali`, `array` or `pil`, without importing any."""
    if config.data.backend != "auto":
        missing = config.data.backend == "dali" and not has_dali()
        if missing:
            raise ConfigError(
                f"data.backend is dali, but DALI is not installed: {install_dali('dali')}, or set "
                "data.backend to array."
            )
        return config.data.backend
    # On the CPU DALI's operators take three times as long as array operations (bench/loader.py).
    return "dali" if device.type == "cuda" and has_dali() else "array"


def has_dali() -> bool:
    """Whether DALI is installed, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False


def install_dali(otherwise: str = "") -> str:
    """The command that installs DALI for torch's CUDA; DALI is made for Linux only.

    For another CUDA, or none, it installs the extra `otherwise`; where that is empty, so is this.
    """
    if sys.platform != "linux":
        return "it exists for Linux only" if otherwise else ""
    extra = DALI_EXTRAS.get((torch.version.cuda or "").split(".")[0], otherwise)
    return extra and f'pip install "fastmoco[{extra}]"'


def missing_dali(config: Config, device: torch.device) -> str:
    """What this run loses for want of DALI, and the command that installs it; empty if nothing."""
    served = config.data.backend != "auto" or config.data.source == "synthetic"
    if served or device.type != "cuda" or has_dali() or not (command := install_dali()):
        return ""
    return f"DALI is not installed, so the CPU does what this GPU could: decode, augment; {command}"


Built = tuple[Engine, str]


def build_workers(
    config: Config, plan: Plan, reader: Reader, device: torch.device, backend: str
) -> Built:
    from fastmoco.data.backends.workers import WorkerEngine

    # On the CPU the encoders need the cores as well.
    share = cores() if device.type == "cuda" else max(1, cores() // 2)
    workers = config.data.workers or share
    prefetch = config.data.prefetch
    engine = WorkerEngine(
        reader,
        plan,
        config.augment,
        backend=backend,
        workers=workers,
        prefetch=prefetch,
        device=device,
    )
    return engine, f"{backend}: {workers} worker processes, {prefetch} batches ahead"


def build_dali(config: Config, plan: Plan, reader: Reader, device: torch.device) -> Built:
    from fastmoco.data.backends.dali import DaliEngine

    # A reader process delivers more than 5,000 samples per second, about what one GPU consumes.
    readers = config.data.workers or (2 if cores() >= 8 else 1)
    # A GPU decodes itself: threads only parse headers and copy. More than 8 brought nothing.
    threads = config.data.threads or max(1, min(8, cores() - readers))
    prefetch = config.data.prefetch
    engine = DaliEngine(
        reader,
        plan,
        config.augment,
        readers=readers,
        threads=threads,
        prefetch=prefetch,
        device=device,
    )
    return engine, (
        f"dali on {device.type}: {readers} reader processes, {threads} threads, "
        f"{prefetch} batches ahead"
    )
