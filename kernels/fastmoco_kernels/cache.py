"""The one folder for what is computed once per machine: compiled kernels, indices, demo images.

`FASTMOCO_CACHE` moves it. Standard library only: processes that read images import this.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path

VARIABLE = "FASTMOCO_CACHE"


def cache_folder() -> Path:
    """$FASTMOCO_CACHE as it is; else `fastmoco` among the caches of this user, made if need be.

    Those are $XDG_CACHE_HOME or ~/.cache, on Windows %LOCALAPPDATA%. Where they cannot be written
    (a read-only home, none at all) it is a folder for temporary files that only this user may open.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    folder = _among_caches()
    return folder if folder is not None and _writable(folder) else temporary_folder()


def _among_caches() -> Path | None:
    windows = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    if base := os.environ.get("XDG_CACHE_HOME") or windows:
        return Path(base) / "fastmoco"
    try:
        return Path.home() / ".cache" / "fastmoco"
    except RuntimeError:  # a user without a home
        return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def private(folder: Path) -> Path:
    """The folder, made if need be; nobody but this user can write into it.

    Raises `OSError` where it cannot be made, or is another user's or a link.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not belongs_to_user(folder):
        raise PermissionError(f"{folder} belongs to another user, or others may write into it")
    return folder


def belongs_to_user(path: Path) -> bool:
    """Whether path is no link, belongs to this user and only this user may write to it.

    On Windows, where permissions are lists of their own, caches lie in the user's profile.
    """
    if not hasattr(os, "getuid"):
        return path.exists()
    found = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return (
        not stat.S_ISLNK(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & others
    )


def user_suffix() -> str:
    """What keeps the folders of users apart; nothing on Windows, where each has a profile."""
    return f"-{os.getuid()}" if hasattr(os, "getuid") else ""


@cache
def temporary_folder() -> Path:
    """`fastmoco-<user number>` among the temporary files, or a new folder if that is not ours."""
    try:
        return private(Path(tempfile.gettempdir()) / f"fastmoco{user_suffix()}")
    except OSError:
        folder = tempfile.mkdtemp(prefix="fastmoco-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)
