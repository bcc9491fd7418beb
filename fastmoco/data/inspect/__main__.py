"""What is in a data set, and with which settings to train on it.

    fastmoco inspect ROOT [--html FILE] [--samples N]

Sizes and unreadable headers come from the index that training uses. All else is found in an even
sample, which is read and decoded once.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastmoco.config import Config, ConfigError, check, parse
from fastmoco.config.command import CommandParser
from fastmoco.data.inspect.advice import Advice, advise, measured, without_colour
from fastmoco.data.inspect.contents import contents_of, duplicates_of
from fastmoco.data.inspect.findings import Findings
from fastmoco.data.inspect.html import page_of
from fastmoco.data.inspect.kinds import channels_for
from fastmoco.data.inspect.look import evenly_spaced, kinds_of, look_at
from fastmoco.data.inspect.rate import loader_rate
from fastmoco.data.inspect.terminal import terminal_width, text_of
from fastmoco.data.page import require_writable, write_page
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables.labels import is_table, table_suffix
from fastmoco.machine.stopping import exit_code

SAMPLES = 5000
# Pictures whose headers choose `data.channels`, before any is decoded with that many.
_FIRST = 256


def inspect(config: Config, samples: int = SAMPLES) -> Findings:
    """Everything about a data set.

    config: from `resolve_folders`. samples: how many pictures to decode at most; 0: all. Raises
    `ConfigError` for a set without a picture whose header can be read.
    """
    source = open_source(config)
    config, wrong = _with_channels(config, source), ""
    try:
        config = measured(config, source)
    except ConfigError as error:
        wrong = str(error)
    rule, notes = PixelRule.of(config.data), source.warnings + source.notes
    looks = look_at(source, evenly_spaced(len(source.sizes), samples), rule, "look")
    contents = contents_of(source, looks)
    advice, rate, loader = Advice([], [wrong]), 0.0, "Not measured."
    if not wrong:
        config, advice = advise(config, contents, source)
        try:
            rate, loader = loader_rate(config, source)
        except ConfigError as error:
            loader = f"It cannot run: {error}"
    test = None
    try:
        test = _test_source(config)
    except ConfigError as error:
        notes.append(f"The kNN test set cannot be opened: {error}")
    tested = []
    if test is not None:
        tested = look_at(test, evenly_spaced(len(test.sizes), samples), rule, "look at test")
    duplicates = duplicates_of(contents.good, [look for look in tested if not look.bad])
    return Findings(config, source, contents, test, duplicates, advice, rate, loader, notes)


def _with_channels(config: Config, source: Source) -> Config:
    """The run with `data.channels` of most pictures, unless it has other ones already."""
    if config.data.channels != 3:
        return without_colour(config)
    bad = source.bad
    numbers = [n for n in evenly_spaced(len(source.sizes), _FIRST) if n not in bad]
    colours = Counter(kind.colours for kind in kinds_of(source, numbers))
    if not colours:
        return config
    data = replace(config.data, channels=channels_for(colours))
    return without_colour(replace(config, data=data))


def _test_source(config: Config) -> Source | None:
    """The kNN test set; None where there is none. Raises `ConfigError`."""
    root = config.knn.test_root
    if not root:
        return None
    kind = "list" if Path(root).is_file() else "folder"
    if is_table(root):
        kind = table_suffix(root).removeprefix(".")
    data = replace(config.data, source=kind, root=root, shuffle_window=0)  # type: ignore[arg-type]
    return open_source(replace(config, data=data))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="fastmoco inspect",
        usage="fastmoco inspect ROOT [--html FILE] [--samples N] [--data.source ...]",
        description="What is in a data set, and with which settings to train on it.",
        epilog="ROOT is data.root. Every option of fastmoco train is one of this as well.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--html", type=Path, help="write the page with a contact sheet to this file")
    add("--samples", type=int, default=SAMPLES, help="pictures to decode (5000); 0: all")
    return parser


def _without_root(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that belong to no option, and all others.

    argparse itself would take the values of options that it does not know for ROOT.
    """
    free: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            free.append(word)
            continue
        rest.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            rest += [value for value in (next(words, None),) if value is not None]
    return free, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one sentence for what cannot be inspected."""
    parser = _parser()
    roots, words = _without_root(sys.argv[1:] if arguments is None else arguments)
    own, rest = parser.parse_known_args(words)
    if own.samples < 0:
        parser.error(f"--samples is {own.samples}, but must be at least 0")
    if len(roots) > 1:
        parser.error(f"there are several folders, {' and '.join(roots)}: name one")
    if roots and any(word.split("=")[0] == "--data.root" for word in rest):
        parser.error(f"both {roots[0]} and --data.root are given: name one")
    if not roots and not rest:
        parser.error("name the folder of the images, as in fastmoco inspect ROOT")
    try:
        config = parse([*rest, *(["--data.root", roots[0]] if roots else [])])
        config = replace(config, knn=replace(config.knn, every=0))
        check(without_colour(config), 1)
        if own.html is not None:
            require_writable(own.html)  # asked before the hours that a look at everything takes
        found = inspect(resolve_folders(config), own.samples)
        print(text_of(found, terminal_width()), flush=True)
        if own.html is not None:
            write_page(own.html, page_of(found))
            print(f"\nThe page with pictures: {own.html}")
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
