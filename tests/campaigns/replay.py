"""A folder as a power loss leaves it, from the record of operations by `disk_faults.c`.

What a program has written is on the disk for certain only after `fsync` of the file, and its name
only after `fsync` of the folder. The rest may be there or not: a file system writes data and names
in an order of its own.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    """One line of the record."""

    what: str
    file: int
    at: int
    size: int
    data: int
    one: str
    other: str


def operations(log: Path, was: Path, now: Path) -> list[Operation]:
    """The record in order, of the folder `was`, as if it were that of `now`."""
    found = []
    for line in log.read_text().replace(f"\t{was}", f"\t{now}").splitlines():
        what, file, at, size, data, one, other = line.split("\t")
        found.append(Operation(what, int(file), int(at), int(size), int(data), one, other))
    return found


@dataclass
class File:
    """A file: what is on the disk for certain, and the changes since, in order."""

    durable: bytes = b""
    pending: list[Callable[[bytearray], None]] = field(default_factory=list)

    def after(self, changes: Sequence[Callable[[bytearray], None]]) -> bytes:
        """Its contents after these changes."""
        content = bytearray(self.durable)
        for change in changes:
            change(content)
        return bytes(content)

    def sync(self) -> None:
        """All of it is on the disk."""
        self.durable, self.pending = self.after(self.pending), []

    def left(self, how: str, draw: random.Random) -> bytes:
        """What a power loss leaves of it."""
        if how == "nothing" or not self.pending:
            return self.durable
        if how == "names":  # as large as it was to be, without the data
            whole = self.after(self.pending)
            same = min(len(whole), len(self.durable))
            return self.durable[:same] + bytes(len(whole) - same)
        return self.after([change for change in self.pending if draw.random() < 0.5])


Names = dict[str, "File | str"]
"""Files, and texts of symbolic links, by path."""


class Disk:
    """Names and files below a folder."""

    def __init__(self, folder: Path) -> None:
        """The folder as it is now counts as being on the disk."""
        self._root, self._files = folder, dict[int, File]()
        self._durable: Names = {}
        for path in folder.rglob("*") if folder.is_dir() else ():
            if path.is_symlink():
                self._durable[str(path)] = os.readlink(path)
            elif path.is_file():
                file = self._files.setdefault(path.stat().st_ino, File(path.read_bytes()))
                self._durable[str(path)] = file
        self._now: Names = dict(self._durable)
        self._pending: list[tuple[str, Callable[[Names], None]]] = []

    def apply(self, operation: Operation, data: bytes) -> None:
        """One operation; data: what all of them wrote."""
        if operation.what in ("create", "rename", "link", "symlink", "unlink"):
            change = self._renaming(operation)
            change(self._now)
            self._pending.append((os.path.dirname(operation.one), change))
        elif file := self._files.get(operation.file):
            if operation.what == "fsync":
                file.sync()
            else:
                file.pending.append(_writing(operation, data))
        elif operation.what == "fsync":
            self._sync_folder(operation.one)

    def _renaming(self, operation: Operation) -> Callable[[Names], None]:
        one, other = operation.one, operation.other
        if operation.what == "create":
            file = self._files[operation.file] = File()
            return lambda names: names.__setitem__(one, file)
        if operation.what == "symlink":
            return lambda names: names.__setitem__(one, other)
        if operation.what == "unlink":
            return lambda names: names.__delitem__(one) if one in names else None
        # safetensors calls the system without the C library: nothing is known of its files.
        moved = self._now.get(one, File())

        def rename(names: Names) -> None:
            if operation.what == "rename":
                names.pop(one, None)
            names[other] = moved

        return rename

    def _sync_folder(self, folder: str) -> None:
        for where, change in self._pending:
            if where == folder:
                change(self._durable)
        self._pending = [change for change in self._pending if change[0] != folder]

    def lose_power(self, how: str, draw: random.Random) -> None:
        """Leave in the folder what is there after a power loss.

        how: of what was not flushed `nothing` is there; all `names` but no data; or, `some`: of the
        names those up to a moment, as a journal keeps them, and of the data any part.
        """
        most = len(self._pending)
        count = {"nothing": 0, "names": most}.get(how, draw.randint(0, most))
        names = dict(self._durable)
        for _, change in self._pending[:count]:
            change(names)
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(parents=True)
        for name, file in names.items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, str):
                path.symlink_to(file)
            else:
                path.write_bytes(file.left(how, draw))


def _writing(operation: Operation, data: bytes) -> Callable[[bytearray], None]:
    if operation.what == "truncate":

        def cut(content: bytearray) -> None:
            del content[operation.at :]
            content.extend(bytes(operation.at - len(content)))

        return cut
    written = data[operation.data : operation.data + operation.size]

    def write(content: bytearray) -> None:
        content.extend(bytes(max(0, operation.at - len(content))))
        content[operation.at : operation.at + operation.size] = written

    return write
