"""Which backend makes the views: `data.backend`. Each one builds itself from the configuration."""

from __future__ import annotations

import importlib.util
import sys

import torch

from fastmoco.config import Config, ConfigError
from fastmoco.config.checks import RGB8_BACKENDS
from fastmoco.data.backends.engine import Engine
from fastmoco.data.backends.synthetic import SyntheticEngine
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Reader

# The extra of this project with DALI for the CUDA that torch was built with.
DALI_EXTRAS = {"12": "dali-cuda12", "13": "dali"}


def choose_backend(config: Config, device: torch.device) -> str:
    """`dali`, `nvjpeg`, `array` or `pil`. Raises `ConfigError` for one that cannot work here."""
    backend = config.data.backend
    if config.data.float_views:
        if backend in RGB8_BACKENDS:
            raise ConfigError(
                f"data.backend is {backend}, which makes views of 8-bit RGB only, but the pictures "
                "have other channels or more bits: set data.backend to array or pil."
            )
        return "pil" if backend == "pil" else "array"
    if backend != "auto":
        if backend == "nvjpeg" and (reason := why_no_nvjpeg(device)):
            raise ConfigError(f"data.backend is nvjpeg, but {reason}: set data.backend to array.")
        if backend == "dali" and not has_dali():
            raise ConfigError(
                f"data.backend is dali, but DALI is not installed: {install_dali('dali')}, or set "
                "data.backend to array."
            )
        return backend
    # On the CPU a step fed by DALI takes 1.19 times as long (bench/results/ablation.jsonl).
    if device.type != "cuda":
        return "array"
    if has_dali():
        return "dali"
    return "array" if why_no_nvjpeg(device) else "nvjpeg"


def why_no_nvjpeg(device: torch.device) -> str:
    """Why torchvision cannot decode on this device; empty if it can."""
    from fastmoco.data.backends.nvjpeg.decoder import why_not

    return why_not(device)


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
    """What this run loses without DALI, and the command that installs it; empty if nothing.

    Where nvJPEG decodes instead, that is not known.
    """
    data = config.data
    served = data.backend != "auto" or data.source == "synthetic" or data.float_views
    if served or device.type != "cuda" or has_dali() or not (command := install_dali()):
        return ""
    if not (reason := why_no_nvjpeg(device)):
        return ""
    return (
        f"DALI is not installed, and {reason}, so the CPU does what this GPU could: decode and "
        f"crop; {command}"
    )


def build_engine(config: Config, plan: Plan, reader: Reader | None, device: torch.device) -> Engine:
    """The engine of this run; without a reader it makes noise. Raises `ConfigError`."""
    if reader is None:
        return SyntheticEngine(config, plan, device)
    backend = choose_backend(config, device)
    # Imported on demand: DALI takes seconds to load, and may not be installed.
    if backend == "dali":
        from fastmoco.data.backends.dali.engine import DaliEngine

        return DaliEngine(config, plan, reader, device)
    if backend == "nvjpeg":
        from fastmoco.data.backends.nvjpeg.engine import NvjpegEngine

        return NvjpegEngine(config, plan, reader, device)
    from fastmoco.data.backends.workers import WorkerEngine

    return WorkerEngine(config, plan, reader, device, backend)
