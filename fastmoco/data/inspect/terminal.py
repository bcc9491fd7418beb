"""What was found, as text for a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from fastmoco.data.inspect.findings import Findings, Section, sections

_LEAST_WIDTH = 60


def text_of(found: Findings, width: int = 0) -> str:
    """The page. width: columns of the terminal, within which sentences are folded; 0: any."""
    parts = [found.root, *("\n".join(_section(one, width)) for one in sections(found))]
    advice = found.advice
    told = [f"  {line}" for note in advice.notes for line in _folded(note, width)]
    if not advice.lines:
        return "\n\n".join([*parts, "\n".join(["Recommended", *told])])
    return "\n\n".join(
        [
            *parts,
            f"Recommended, as a file for --config:\n\n{advice.yaml().rstrip()}",
            f"The same as options:\n\n{advice.command()}",
            "\n".join(["Besides", *told]),
        ]
    )


def _section(section: Section, width: int) -> Iterator[str]:
    yield section.title
    yield from (f"  {line}" for line in _table(section.header, section.rows))
    yield from (f"  {line}" for one in section.sentences for line in _folded(one, width))


def _folded(sentence: str, width: int) -> list[str]:
    if not width:
        return [sentence]
    room = max(_LEAST_WIDTH, width) - 2
    return textwrap.wrap(sentence, room, break_on_hyphens=False, break_long_words=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their longest entry; numbers stand at the right."""
    if not rows:
        return
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    right = [all(line[at].replace(",", "").isdigit() for line in rows) for at in range(len(header))]
    for line in lines if any(header) else lines[1:]:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        )
        yield "  ".join(cells).rstrip()


def terminal_width() -> int:
    """Columns of standard output; 0 where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
