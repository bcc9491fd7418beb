"""Files of weights on disk: where they are, what they hold, and how a new one appears whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmoco.config import ConfigError

# What a folder is read from, first found: a run, what a run exported, a folder for the hub.
IN_FOLDER = ("latest.pth.tar", "encoder.safetensors", "model.safetensors")
METADATA = "metadata"
"""Key under which `load` puts the header of a safetensors file, beside its `state_dict`."""


def locate(path: Path) -> Path:
    """The file that `path` means: itself, or the weights inside a run or hub folder.

    Raises `ConfigError` if there is none.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: name a file of weights or a run directory.")
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"The folder {path} holds no weights (none of {', '.join(IN_FOLDER)}).")


def load(path: Path) -> dict[str, Any]:
    """Content of a file of weights, on the CPU. Nothing in the file is executed.

    A safetensors file gives `state_dict` and `metadata`, every other one what `torch.save` wrote.

    Raises `ConfigError` for a file that is damaged, or holds objects besides tensors, numbers and
    text, which only running code from it could restore.
    """
    path = locate(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                return {METADATA: opened.metadata() or {}, "state_dict": load_file(path)}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds "
            "more than tensors, numbers and text; save its state_dict alone to use it."
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__} and no named weights.")
    return dict(content)


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Let `put` write a neighbour of `path` and rename it: nobody ever sees half a file.

    Raises `ConfigError` if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_torch(path: Path, content: object) -> None:
    """Write `content` as `torch.save` does. Raises `ConfigError` if that is not possible."""
    write(path, lambda partial: torch.save(content, partial))


def write_safetensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and a header of texts. Raises `ConfigError` if that is not possible."""
    # timm and others look for "format" to tell whose tensors these are.
    header = {"format": "pt", **metadata}
    write(path, lambda partial: save_file(state, partial, metadata=header))
