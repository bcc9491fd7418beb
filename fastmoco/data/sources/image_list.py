"""A list of images: a path per line, or a table of which one column holds paths.

The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; lines that start with `#` are
comments. Columns are separated by tabs, semicolons or commas, with quotes where needed, or a path
is followed by a space and its label. Relative paths start at the list's folder; `~`, `${HOME}` and
`file://` are understood.

The column of paths is found by its name, else by its content; so is the column of labels, which
only evaluation asks for. Two columns that may be meant are refused with their names.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mode

import numpy as np

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching, spelled_out
from fastmoco.data.sources.folder import FolderSource, look_again, with_stamps
from fastmoco.data.sources.index import Index, kept_index, require_readable
from fastmoco.data.sources.listing import is_image_name, read_file
from fastmoco.data.sources.measure import measure, probe_chunk

# Names of columns, in lower case without signs between the words.
_PATHS = frozenset(
    {
        *("path", "file", "image", "img", "picture", "photo", "fname", "fpath", "filename"),
        *("filepath", "imagepath", "imagefile", "imagename", "imgpath", "imgfile", "imgname"),
        *("imagefilename", "relativepath", "relpath", "absolutepath", "fullpath", "localpath"),
    }
)
LABELS = frozenset(
    {
        *("label", "class", "category", "target", "y", "classname", "classid", "classidx"),
        *("labelname", "labelid", "categoryname", "categoryid", "wnid", "synset"),
    }
)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATOR = re.compile(r"[\t;,\s]")
_PATH_AND_LABEL = re.compile(r"(.+\S)\s+(\S+)")
_LOOK_AT = 50  # rows that tell how a list is written


@dataclass(frozen=True)
class Rows:
    """The rows of a list that name an image."""

    paths: list[str]
    """As they are written, but without `~`, `${HOME}` and `file://`."""
    lines: list[int]
    """Line number of each, from 1."""
    labels: list[str] | None
    """None where the list has no column of labels."""
    label_columns: list[str]
    """Names of the columns that may hold the labels, where these are several."""


def read_list(path: Path) -> Rows:
    """The rows of a list. Raises `ConfigError` if it cannot be read as one."""
    numbered = _lines(path)
    table = _table(path, numbered)
    cells = [row for _, row in table]
    column, header = _path_column(path, cells)
    names = [name.strip() for name in cells[0]] if header else []
    rows = [(line, row) for line, row in table[header:] if any(map(str.strip, row))]
    for line, row in rows:
        if len(row) <= column or not row[column].strip():
            raise ConfigError(
                f"The list {path} names no image in line {line}: write its path there, or delete "
                "the line."
            )
    labelled = _label_columns(cells[header:], names, column)
    labels = None
    if len(labelled) == 1:
        at = labelled[0]
        labels = [row[at].strip() if len(row) > at else "" for _, row in rows]
    return Rows(
        paths=[_path(path.parent, row[column].strip()) for _, row in rows],
        lines=[line for line, _ in rows],
        labels=labels,
        label_columns=[names[at] if names else f"number {at + 1}" for at in labelled],
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbers and text of the lines that are neither empty nor a comment."""
    try:
        data = read_file(str(path))
    except OSError as error:
        raise ConfigError(
            f"data.root {path} cannot be read as a list of images: {error.strerror}."
        ) from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not encoding and data[1:2] == b"\0":
        encoding = "utf-16-le"
    try:
        text = data.decode(encoding or "utf-8", "strict" if "16" in encoding else "surrogateescape")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The list {path} is no text in {encoding}: {error.reason}.") from error
    text = text.removeprefix("\ufeff")
    lines = re.split(r"\r*\n", text) if "\n" in text else text.split("\r")
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ConfigError(
                f"The list {path} holds a NUL byte in line {number}, so it is no text file: name "
                "a file with one path per line."
            )
    return [(n, line) for n, line in enumerate(lines, start=1) if line.strip() and not _said(line)]


def _said(line: str) -> bool:
    """Whether a line is a comment; `#1.jpg` is a path, with or without a label."""
    cells = re.split(r"[\t;,\s]", line)
    return line.startswith("#") and (line[1:2] in " \t#!" or not any(map(is_image_name, cells)))


Table = list[tuple[int, list[str]]]


def _table(path: Path, lines: list[tuple[int, str]]) -> Table:
    """Line numbers and cells: by the separator that the rows agree on, else whole lines."""
    sample = [line for _, line in lines[:_LOOK_AT]]
    whole: Table = [(number, [_unquoted(line)]) for number, line in lines]
    comma_separated = path.suffix.lower() in (".csv", ".tsv")
    if not comma_separated and any(
        _SEPARATOR.search(line.strip()) and _exists(path.parent, _unquoted(line)) for line in sample
    ):
        return whole  # a path may hold any sign
    if sign := _sign(path, sample, comma_separated=comma_separated):
        return _separated(path, lines, sign)
    if 2 * sum(_has_label(line) for line in sample) > len(sample):
        return [(number, _path_and_label(line)) for number, line in lines]
    return whole


def _sign(path: Path, sample: Sequence[str], *, comma_separated: bool) -> str:
    """What separates all rows, else most of them, where one lacks a cell; empty for whole lines."""
    tables = {sign: _rows(sample, sign) for sign in "\t;,"}
    for sign, rows in tables.items():
        several = min(map(len, rows), default=1) > 1
        if several and (comma_separated or _is_table(path, sample, rows)):
            return sign
    for sign, rows in tables.items():
        if 2 * sum(_is_row(path.parent, row, sign) for row in rows) > len(rows):
            return sign
    return "," * comma_separated


def _rows(sample: Sequence[str], sign: str) -> list[list[str]]:
    try:
        return list(csv.reader(sample, delimiter=sign))
    except csv.Error:
        return []


def _is_table(path: Path, sample: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the rows of a text file are more than paths that hold the sign."""
    if any(plain(name) in _PATHS for name in rows[0]):
        return True
    if not all(is_image_name(_unquoted(line)) for line in sample):
        return any(is_image_name(cell.strip()) for cell in rows[-1])
    return any(_exists(path.parent, cell.strip()) for row in rows for cell in row)


def _is_row(folder: Path, row: Sequence[str], sign: str) -> bool:
    """Whether a row is a path and more, not a path that holds the sign."""
    cells = [cell.strip() for cell in row]
    more = any(map(is_image_name, cells)) and not is_image_name(sign.join(cells))
    return len(row) > 1 and (more or any(_exists(folder, cell) for cell in cells))


def _has_label(line: str) -> bool:
    pair = _PATH_AND_LABEL.fullmatch(line.strip())
    return pair is not None and is_image_name(_unquoted(pair[1]))


def _path_and_label(line: str) -> list[str]:
    """The path of a line, and its label, which may be missing."""
    pair = _PATH_AND_LABEL.fullmatch(line.strip())
    if pair is None or (not _has_label(line) and is_image_name(_unquoted(line))):
        return [_unquoted(line), ""]
    return [_unquoted(pair[1]), pair[2]]


def _separated(path: Path, lines: list[tuple[int, str]], sign: str) -> Table:
    """Line numbers and cells. Raises `ConfigError` for a quote that swallows other rows."""
    reader = csv.reader((line for _, line in lines), delimiter=sign)
    rows: Table = []
    first = 0
    try:
        for row in reader:
            if reader.line_num > first + 1:  # a text in quotes goes on, or a quote is not closed
                part = [line for _, line in lines[first : reader.line_num]]
                _require_closed(path, part, sign, {len(row), len(rows[0][1] if rows else row)})
            rows.append((lines[first][0], row))
            first = reader.line_num
    except csv.Error as error:
        raise ConfigError(f"The list {path} {_fault(str(error), lines[first][0])}.") from error
    return rows


def _require_closed(path: Path, lines: Sequence[str], sign: str, widths: set[int]) -> None:
    """Raises `csv.Error` where lines are not one row of a table that has so many columns."""
    list(csv.reader(lines, delimiter=sign, strict=True))
    for line in lines[1:]:
        cells = line.partition('"')[0].split(sign)
        if len(cells) in widths and _is_row(path.parent, cells, sign):
            raise csv.Error


def _fault(error: str, line: int) -> str:
    """What is wrong in a line that `csv` cannot read, and what to do."""
    if "field" in error and "limit" in error:
        return (
            f"has a cell of more than {csv.field_size_limit():,} signs in line {line}: close the "
            "quote before it, or leave that column out"
        )
    if "new-line" in error:
        return f"has a carriage return in the middle of line {line}: delete it"
    return (
        f"has a quote in line {line} that is not closed as it should be: delete it, or write "
        'quotes that belong to a text twice, as in "a ""b"" c"'
    )


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def plain(name: str) -> str:
    """A column's name without case, signs and plural."""
    return re.sub(r"[\W_]", "", name.lower()).removesuffix("s")


def _path_column(path: Path, cells: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Number of the column of paths, and of the rows above it that are a header: 0 or 1."""
    if not cells:
        return 0, 0
    first = cells[0]
    named = [at for at, name in enumerate(first) if plain(name) in _PATHS]
    if len(named) == 1:
        return named[0], 1
    if not named:
        body = cells[1:_LOOK_AT] or cells
        named = [at for at in range(len(first)) if _most(body, at, is_image_name)]
        if not named:
            named = [
                at for at in range(len(first)) if _most(body, at, partial(_exists, path.parent))
            ][:1]
        if not named:
            counted = len(first) > 1 and _most(body, 0, str.isdigit)  # an index, as of pandas
            return int(counted), int(counted and not first[0])
        header = len(cells) > 1 and not is_image_name(first[named[0]])
        if len(named) == 1:
            return named[0], int(header and not _exists(path.parent, first[named[0]]))
    names = ", ".join(first[at].strip() or f"number {at + 1}" for at in named)
    raise ConfigError(
        f"The list {path} has several columns that may hold the paths ({names}): keep one of them."
    )


def _most(rows: Sequence[Sequence[str]], at: int, test: Callable[[str], bool]) -> bool:
    """Whether a test holds for more than half of a column."""
    held = sum(bool(test(row[at].strip())) for row in rows if len(row) > at and row[at].strip())
    return 2 * held > len(rows)


def _label_columns(cells: Sequence[Sequence[str]], names: Sequence[str], column: int) -> list[int]:
    """The columns that may hold the labels: by name, or the only one beside the paths."""
    if named := [at for at, name in enumerate(names) if plain(name) in LABELS]:
        return named
    width = mode(map(len, cells[:_LOOK_AT])) if cells else 0  # a row may lack its label
    others = [at for at in range(width) if at != column]
    # An index, as of pandas; the header of R is one cell shorter than its rows.
    unnamed = [at for at in others if names and not "".join(names[at : at + 1])]
    others = [at for at in others if at not in unnamed]
    return others if not names or len(others) == 1 else []


def _exists(folder: Path, text: str) -> bool:
    return bool(text) and os.path.lexists(os.path.join(folder, _path(folder, text)))


def _path(folder: Path, text: str) -> str:
    """A path of a list, as this system writes it."""
    special = text.startswith(("~", "file://")) or "$" in text or "\\" in text
    if not special or os.path.lexists(os.path.join(folder, text)):
        return text
    if "\\" in text and "/" not in text:  # written by Windows
        return text.replace("\\", "/")
    try:
        return spelled_out(text)
    except ConfigError:
        return text  # a name may hold these signs


def labelled_list(path: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image paths in the order of the list, their labels, and the class names in order.

    Labels that are all whole numbers are ordered as numbers. Raises `ConfigError` for a list
    without labels, or with several columns that may hold them.
    """
    rows = read_list(path)
    if rows.labels is None:
        names = ", ".join(rows.label_columns)
        several = f"has several columns that may hold the labels ({names}): keep one of them"
        raise ConfigError(
            f"The list {path} {several if names else 'has no labels: add a column label'}."
        )
    for line, label in zip(rows.lines, rows.labels, strict=True):
        if not label:
            raise ConfigError(
                f"The list {path} has no label in line {line}: write it there, or delete the line."
            )
    return [path.parent / name for name in rows.paths], *numbered(rows.labels)


def numbered(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """The class of each label, and the class names in order: as numbers where all are."""
    whole = all(re.fullmatch(r"-?\d+", label) for label in labels)
    classes = sorted(set(labels), key=int if whole else str)
    number = {name: at for at, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def list_stamp(paths: Iterable[Path]) -> str:
    """Changes when one of the lists does."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"data.root {path} cannot be read: {error.strerror}.") from error
        digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()


def scan_list(paths: Sequence[Path], max_pixels: int) -> Index:
    """The index of the listed images, in the order of the lists."""
    began, stamp = time.time_ns(), list_stamp(paths)
    root, names, lines = paths[0].parent, list[str](), list[str]()
    for path in paths:
        rows = read_list(path)
        inside = path.parent == root
        names += rows.paths if inside else [os.path.join(path.parent, n) for n in rows.paths]
        prefix = f"{path.name} " * (len(paths) > 1)
        lines += [f"{prefix}line {number}" for number in rows.lines]
    encoded = [os.fsencode(name) for name in names]
    files = (os.path.join(root, name) for name in names)
    sizes, bad = measure(partial(probe_chunk, max_pixels=max_pixels), files, len(names))
    arrays = {
        "folder_of": np.zeros(len(names), np.uint32),
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "sizes": sizes,
    }
    where = {sample: lines[sample] for sample in bad}
    facts = {"folders": [["", 0]], "bad": bad, "where": where, "stamp": stamp}
    return with_stamps(str(root), Index(arrays, facts), began)


def open_list(root: str, max_pixels: int, *, rescan: bool = False) -> FolderSource:
    """The images that one list names, or several by a pattern; rescan: measure them anew.

    Raises `ConfigError` as `open_folder` does.
    """
    if not root:
        raise ConfigError("data.root is not set: name the list of the training images.")
    paths = [Path(os.path.realpath(path)) for path in matching(root)]
    stamp = list_stamp(paths)
    index = kept_index(
        f"{paths} {max_pixels}",
        holds=lambda index: index.facts.get("stamp") == stamp,
        scan=lambda: scan_list(paths, max_pixels),
        again=lambda index: look_again(FolderSource(str(paths[0].parent), index), max_pixels),
        rescan=rescan,
    )
    require_readable(index, f"data.root {root}")
    return FolderSource(str(paths[0].parent), index)
