"""Objects of a bucket: what there is, and their bytes, checked and in spite of faults.

fsspec speaks the protocols. A request that fails is repeated after 0.2, 0.4, ... seconds; after
eight failures the run stops with a sentence, because a sample that the network lost is not a bad
one: replacing it would change what is trained on.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from functools import cache
from typing import Any, BinaryIO, NamedTuple, TypeVar

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching_words

ATTEMPTS = 8
PAUSE_S = 0.2
PIECE = 8 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")
_OPAQUE: set[str] = set()
"""Folders with ETags that look like an MD5 and are none."""
Result = TypeVar("Result")


class MissingError(ConfigError):
    """There is no such object."""


class ForbiddenError(ConfigError):
    """The object may not be read, or may not be known to be missing."""


class Object(NamedTuple):
    """One object as it was listed."""

    url: str
    size: int
    tag: str
    """Its ETag, or another mark that changes with the content; empty where there is none."""


def is_remote(root: str) -> bool:
    """Whether a root names object storage."""
    return "://" in root and not root.startswith("file://")


@cache
def _files(protocol: str, process: int) -> Any:
    """The file system of a protocol; one per process, as its connections do not survive a fork."""
    try:
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if protocol == "s3":
            waits = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}
            options["config_kwargs"] = waits
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ConfigError(
            f"{protocol}:// needs {error}: pip install 'fastmoco[remote]', or the package of "
            "fsspec for this protocol."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{protocol}:// is no storage that fsspec knows: {error}.") from error


def _of(url: str) -> Any:
    return _files(url.partition("://")[0], os.getpid())


def _insist(what: str, work: Callable[[], Result]) -> Result:
    """The result of work that may fail for a while. Raises `ConfigError` when it keeps failing."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except ConfigError:
            raise
        except Exception as raised:  # every protocol has its own
            error = _cause(what, raised)
            if isinstance(error, FileNotFoundError):
                raise MissingError(f"{what} does not exist.") from error
            if isinstance(error, PermissionError):
                why = " ".join(str(error).split()) or "no permission"
                raise ForbiddenError(f"{what} may not be read: {why.rstrip('.')}.") from error
            if attempt == ATTEMPTS - 1:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"{what} cannot be read, {ATTEMPTS} times in a row ({why}); the run goes on "
                    "from its last checkpoint when it is started again."
                ) from error
            time.sleep(min(PAUSE_S * 2**attempt, 10.0))
    raise AssertionError("unreachable")


def _cause(what: str, raised: Exception) -> BaseException:
    """What is wrong. Over HTTP fsspec calls an object missing whatever its server answers."""
    status = _status(raised)
    cause = raised.__cause__
    if what.startswith("http") and isinstance(raised, FileNotFoundError) and cause:
        status = _status(cause)
        if status in (404, 410):
            return raised
        return PermissionError(str(cause)) if status in (401, 403) else cause
    # gcsfs says so of what is not there, too, where nobody may list.
    forbidden = status in (401, 403) or str(raised).startswith("Forbidden")
    return PermissionError(str(raised)) if forbidden else raised


def _status(error: BaseException) -> object:
    """The number of the answer that some protocols keep."""
    return getattr(error, "status", getattr(error, "code", None))


def _object(url: str, info: dict[str, Any]) -> Object:
    marks = (
        info.get(key)
        for key in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime")
    )
    tag = next((str(mark).strip('"') for mark in marks if mark), "")
    return Object(url, int(info.get("size") or 0), tag)


def look(url: str) -> Object:
    """The object as it is now. Raises `ConfigError`."""
    return _insist(url, lambda: _object(url, _of(url).info(url)))


def listed(root: str, suffix: str) -> list[Object]:
    """The objects with a suffix below a root, or of a pattern, sorted; `https` lists no folders.

    Raises `ConfigError` for none.
    """
    found: list[Object] = []
    for url in matching_words(root):
        if url.endswith(suffix) and "*" not in url:
            found.append(look(url))
            continue
        if url.startswith("http"):
            raise ConfigError(f"{url} names no {suffix} file: write each, as {{000..099}}.")
        pattern = url if "*" in url else f"{url.rstrip('/')}/**"
        protocol = url.partition("://")[0]
        rows = _insist(url, lambda p=pattern, u=url: _of(u).glob(p, detail=True))  # type: ignore[misc]
        objects = (_object(f"{protocol}://{name}", info) for name, info in rows.items())
        found += sorted(one for one in objects if one.url.endswith(suffix))
    if not found:
        raise ConfigError(f"data.root {root} holds no {suffix} object.")
    return found


def there(url: str) -> Object | None:
    """The object as it is now; None where there is none, or nobody may know. Raises `ConfigError`.

    S3 and Google answer 403 and 401 for what is missing where listing is not allowed, as in most
    public buckets.
    """
    try:
        return look(url)
    except (MissingError, ForbiddenError):
        return None


def head(url: str, size: int) -> bytes:
    """The first bytes. Raises `ConfigError`."""
    return _insist(url, lambda: bytes(_of(url).cat_file(url, start=0, end=size)))


def fetch(one: Object, into: BinaryIO) -> None:
    """Writes the object. Raises `ConfigError` where it has changed or stays damaged; `OSError`
    where the disk is full.
    """
    require_same(one)
    place = one.url.rpartition("/")[0]
    sums: list[str] = []
    for _ in range(ATTEMPTS):
        into.seek(0)
        digest = hashlib.md5(usedforsecurity=False)
        for start in range(0, one.size, PIECE):
            piece = _insist(one.url, lambda s=start: _piece(one, s))  # type: ignore[misc]
            digest.update(piece)
            into.write(piece)
        # The ETag of an object that was sent in one part is its MD5; of others it is opaque.
        if not _MD5.fullmatch(one.tag) or place in _OPAQUE or digest.hexdigest() == one.tag:
            break
        require_same(one)
        if digest.hexdigest() in sums:  # damage differs: these tags are others, as with KMS keys
            _OPAQUE.add(place)
            break
        sums.append(digest.hexdigest())
    else:
        raise ConfigError(f"{one.url} arrives with another checksum than its ETag.")
    require_same(one)


def _piece(one: Object, start: int) -> bytes:
    end = min(start + PIECE, one.size)
    data = bytes(_of(one.url).cat_file(one.url, start=start, end=end))
    if len(data) != end - start:
        if look(one.url).size != one.size:
            require_same(one)
        raise OSError(f"{len(data)} of {end - start} bytes came")
    return data


def require_same(one: Object) -> None:
    """Raises `ConfigError` where the object is not the one that was listed."""
    now = look(one.url)
    if now != one:
        raise ConfigError(
            f"{one.url} has changed since this run listed it ({one.size:,} bytes, {one.tag}; now "
            f"{now.size:,}, {now.tag}): put it back, or start a new run on the new data."
        )
