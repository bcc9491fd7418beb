"""Files of weights on disk: where they are, what they hold, and how a new one appears whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.machine import durable
from fastmoco.weights.checksums import OURS, damage

LATEST = "latest.pth.tar"
"""Of a run directory: a link to its newest checkpoint, or a text with its name."""
CHECKPOINT = re.compile(r"checkpoint_(\d+)_step(\d+)\.pth\.tar")
"""Name of a checkpoint: epochs and steps done."""
# What a folder without checkpoints is read from, first found: an export, a folder for the hub.
EXPORTED = ("encoder.safetensors", "model.safetensors")
METADATA = "metadata"
"""Key under which `load` puts the header of a safetensors file, beside its `state_dict`."""


def locate(path: Path) -> Path:
    """The file that `path` means: itself, or the weights inside a run or hub folder.

    Raises `ConfigError` if there is none.
    """
    if path.name == LATEST:
        path = path.parent
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: name a file of weights or a run directory.")
        return path
    if (newest := latest(path)) is not None:
        return newest
    for name in EXPORTED:
        if (path / name).is_file():
            return path / name
    names = ", ".join((LATEST, *EXPORTED))
    raise ConfigError(f"The folder {path} holds no weights yet (none of {names}).")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run directory, the newest first; whatever `LATEST` says."""
    found = [path for path in folder.glob("checkpoint_*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((p for p in found if p.is_file()), key=lambda p: (steps_in(p), p.name))[::-1]


def steps_in(path: Path) -> int:
    """The number of steps in the name of a checkpoint; -1 for another name."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match.group(2)) if match else -1


def epoch_in(path: Path) -> int:
    """The number of epochs in the name of a checkpoint; -1 for another name."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def epoch_said(value: Any, place: Path | str) -> int:
    """The number of epochs that a file says of itself. Raises `ConfigError` if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        told = " ".join(repr(value).split())[:60]
        raise ConfigError(
            f"{place} says that it is of the epoch {told}, which is no number: save its state_dict "
            "alone to use it."
        ) from error


def pointed_at(folder: Path) -> Path | None:
    """What `latest.pth.tar` names, be it there or not; itself where it is a whole file."""
    pointer = folder / LATEST
    if pointer.is_symlink():
        return pointer.resolve()
    if not pointer.is_file():
        return None
    with pointer.open("rb") as opened:
        name = opened.read(256).decode("utf-8", errors="replace").strip()
    return folder / name if CHECKPOINT.fullmatch(name) else pointer


def point_at(path: Path) -> None:
    """Make `latest.pth.tar` beside `path` a link to it, or a text with its name."""
    pointer = path.with_name(LATEST + ".partial")
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(path.name)
    except (OSError, NotImplementedError):  # Windows without the right to, FAT, some shares
        pointer.write_text(path.name, encoding="utf-8")
    pointer.replace(path.with_name(LATEST))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run directory, None where there is none.

    Found by looking at the folder: the link `latest.pth.tar` may be missing, or older, or a text,
    in a copy. Raises `ConfigError` where it names a checkpoint and there is none at all.
    """
    if found := checkpoints(folder):
        return found[0]
    target = pointed_at(folder)
    if target is not None and not target.is_file():
        raise ConfigError(
            f"{folder / LATEST} names {target.name}, which is gone, and no other checkpoint is "
            f"there: delete {LATEST} to start afresh, or name a checkpoint in run.resume."
        )
    return target


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
        damaged = damage(path, content) if isinstance(content, Mapping) else ""
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds "
            "more than tensors, numbers and text; save its state_dict alone to use it."
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__} and no named weights.")
    if damaged:
        raise ConfigError(f"{path} is damaged: {damaged}.")
    return dict(content)


def configuration_in(path: Path) -> str | None:
    """The configuration that a checkpoint of ours was written with; None in any other file.

    Its tensors stay on the disk, and nothing is verified: `load` does both.
    """
    try:
        content = torch.load(locate(path), map_location="cpu", weights_only=True, mmap=True)
        text = content[OURS]["config"]
    except Exception:  # damaged, or another format; `load` has the reason
        return None
    return text if isinstance(text, str) else None


def write(path: Path, put: Callable[[Path], object]) -> None:
    """`durable.replace`, in a folder that is made if need be.

    Raises `ConfigError` if the file cannot be written.
    """
    with _a_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, put)


def require_writable(path: Path) -> None:
    """Make its folder if need be; raise `ConfigError` where `write` would."""
    with _a_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.require_writable(path)


@contextlib.contextmanager
def _a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Cannot write {path}: {error}.") from error


def append(path: Path, data: bytes) -> None:
    """Add whole lines, or other records, at the end; on the disk when this returns.

    Raises `OSError`. Nothing of them is left in the file then: a half would spoil the next one.
    """
    with path.open("ab", buffering=0) as opened:
        before = os.fstat(opened.fileno()).st_size
        try:
            while data:
                data = data[opened.write(data) :]
            os.fsync(opened.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def write_torch(path: Path, content: object) -> None:
    """Write `content` as `torch.save` does. Raises `ConfigError` if that is not possible."""

    def put(partial: Path) -> None:
        with partial.open("wb") as opened:
            try:
                torch.save(content, opened)
            except RuntimeError as error:  # torch's own words for a write that failed
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else OSError(str(error)) from error

    write(path, put)


def write_safetensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and a header of texts. Raises `ConfigError` if that is not possible."""
    # timm and others look for "format" to tell whose tensors these are.
    header = {"format": "pt", **metadata}
    # `save_file` would write a file of a random name first, which a power loss may leave behind.
    write(path, lambda partial: partial.write_bytes(save(state, metadata=header)))
