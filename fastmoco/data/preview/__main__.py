"""Draw the views that a run would see, or has seen in a step that it saved.

python -m fastmoco.data.preview --config configs/moco_v2_r50_200ep.yaml --out views.png
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fastmoco.config import ConfigError, check, parse
from fastmoco.config.command import CommandParser
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.preview import replay
from fastmoco.data.preview.draw import draw_replay, draw_views, kind_of
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine import durable
from fastmoco.machine.stopping import exit_code


def main(arguments: list[str] | None = None) -> int:
    """Command line: the options of training, and where to write the picture."""
    parser = CommandParser(
        prog="fastmoco preview",
        description="Draw the views that a run would see.",
        epilog="Every option of fastmoco train is one of this as well.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), help="the picture, .png or .jpg"
    )
    parser.add_argument("--samples", type=int, default=8, help="how many images are shown")
    parser.add_argument("--replay", type=Path, help="a step that a run saved as not finite")
    own, rest = parser.parse_known_args(arguments)
    if own.samples < 1:
        parser.error(f"--samples is {own.samples}, but must be at least 1")
    try:
        kind_of(own.out)
        durable.require_writable(own.out)
        if own.replay:
            step = replay.read(own.replay, rest)
            total = draw_replay(step, own.out, samples=own.samples)
            print(
                f"{own.out}: {min(own.samples, total)} of the {total} samples of step {step.step}"
            )
            return 0
        config = parse(rest)
        without_knn = replace(config, knn=replace(config.knn, every=0))  # nobody needs a test set
        check(config, 1)
        config = resolve_pixels(resolve_folders(without_knn))
        draw_views(config, own.out, samples=own.samples)
    except (ConfigError, OSError) as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(own.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
