"""A benchmark on a terminal: its exit code, what it complains of, its progress and its table.

Tables are drawn by rich; as Markdown where nobody looks or rich is not. The bench extra installs
it: `pip install 'fastmoco[bench]'`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence

from fastmoco.config import ConfigError


def command(program: str) -> Callable[[Callable[[Sequence[str]], None]], Callable[..., int]]:
    """Decorates what a program does with its arguments, by default those of the command line.

    Returns the exit code: 0, or 2 after the sentence of a `ConfigError`.
    """

    def decorate(work: Callable[[Sequence[str]], None]) -> Callable[..., int]:
        def main(arguments: Sequence[str] | None = None) -> int:
            try:
                work(sys.argv[1:] if arguments is None else arguments)
            except ConfigError as error:
                complain(program, str(error))
                return 2
            return 0

        return main

    return decorate


def complain(program: str, sentence: str) -> None:
    """Say it in the program's name beside the table, not in it."""
    print(f"{program}: {sentence}", file=sys.stderr)


def show(caption: str, headers: Sequence[str], body: Sequence[Sequence[str]], note: str) -> None:
    """Print a table whose first column holds names and whose others hold numbers."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _draw(caption, headers, body, note)
    else:
        print("\n".join([caption, "", *markdown(headers, body), "", note]))
    sys.stdout.flush()


def progress(done: int, windows: int) -> None:
    """A counter on one line of the terminal, gone when all is done."""
    if sys.stderr.isatty():
        text = f"{done}/{windows} windows" if done < windows else ""
        print(f"\r{text:24s}\r", end="", file=sys.stderr, flush=True)


def _draw(caption: str, headers: Sequence[str], body: Sequence[Sequence[str]], note: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    console = Console()
    # One column per contestant: what is measured has long names and more lines than there are
    # contestants, and a table of ten columns does not fit 80 characters.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for title, *_ in body:
        short = title.replace("**", "").split(":")[0].removesuffix(" as in ours")
        table.add_column(short, justify="right", overflow="fold", vertical="bottom")
    for index, header in enumerate(headers[1:], 1):
        # Without spaces a range or a unit stays on one line.
        table.add_row(header, *(line[index].replace(" ", "") for line in body))
    console.print(caption, markup=False, highlight=False)
    console.print(table)
    console.print(Markdown(note))


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = "|---|" + "---:|" * (len(headers) - 1)
    top = f"| {' | '.join(headers)} |".replace("|  |", "| |")
    return [top, rule, *(f"| {' | '.join(line)} |" for line in body)]
