"""`python -m fastmoco.doctor`: what this machine has, what a run will use, and what limits it.

Takes the options of `fastmoco.train`; under torchrun it also tries the exchange between ranks.
Takes less than a minute.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from fastmoco.config import Config, ConfigError, check, parse
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.doctor.findings import (
    Line,
    check_exchange,
    check_kernels,
    check_views,
    choices,
    devices,
    versions,
)
from fastmoco.doctor.speed import speed, storage
from fastmoco.machine import ranks
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code


def examine(config: Config, world: World) -> Iterator[Line]:
    """Every finding in the order in which it is made."""
    yield from versions()
    yield from devices(world)
    yield from choices(config, world)
    yield from check_kernels(world.device)
    yield check_exchange(world)
    if config.data.source != "synthetic":
        yield from storage(open_source(config), config)
        yield check_views(config, world.device)
    if world.size == 1:
        yield from speed(config, world)


def _shown(name: str, text: str) -> str:
    """A finding as a line, folded beside its name where a terminal would break it anywhere."""
    line = f"{name:10s}{text}"
    if not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(line, width, subsequent_indent=" " * 10, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a configuration that cannot train, 1 if a check found something wrong."""
    wrong = False
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, "fastmoco doctor")
        world = ranks.start(config.run.device, config.run.timeout_s)
        check(config, world.size)
        config = resolve_pixels(resolve_folders(config))
        for name, text in examine(config, world):
            wrong = wrong or any(word in text for word in ("WARNING", "WRONG", "DIFFERS"))
            if world.is_main:
                print(_shown(name, text), flush=True)
    except (ConfigError, ValueError) as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(exit_code(main))
