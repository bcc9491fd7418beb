"""What the commands of this room have in common: options, recipes, the trunk, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from fastmoco.config import Config, ConfigError
from fastmoco.config.command import CommandParser, as_seed
from fastmoco.config.paths import spelled_out
from fastmoco.machine import collectives, host, ranks
from fastmoco.machine.owner import OwnedError
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import StopRequest, interrupted
from fastmoco.method.agreement import ALONE
from fastmoco.transfer.detector import random_weights
from fastmoco.transfer.training import DivergedError
from fastmoco.weights.architecture import NETWORKS, Architecture
from fastmoco.weights.read import Weights, read

Work = Callable[[argparse.Namespace, World, StopRequest], bool]


def shared_options(parser: CommandParser) -> None:
    """Options of detection and segmentation alike."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file of these options; the command line wins")
    add(
        "--checkpoint",
        required=True,
        help="any file, run or folder of weights that fastmoco reads; supervised:FILE; "
        "random:FILE for its architecture untrained, random:resnet18, or random for resnet50",
    )
    add("--data.root", dest="root", required=True, help="folder of the data set, or: rendered")
    add("--out", type=Path, required=True, help="folder of results; a run there goes on")
    add("--seed", type=as_seed, default=0)
    add("--workers", type=int, default=2, help="reader processes per rank; 0: none of their own")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    add("--save_every", type=int, default=1000, help="steps between two checkpoints")
    add("--test_every", type=int, default=0, help="steps between two tests; 0: at the end only")
    add("--log_every", type=int, default=20, help="steps between two lines")


def check_shared(given: argparse.Namespace) -> None:
    """Raises `ConfigError` for numbers that mean nothing."""
    for name, least in (("save_every", 1), ("test_every", 0), ("log_every", 1), ("workers", 0)):
        if getattr(given, name) < least:
            value = getattr(given, name)
            raise ConfigError(f"--{name} is {value}, but must be at least {least}.")


def trunk_of(text: str, seed: int) -> tuple[Weights, str]:
    """The weights that `--checkpoint` names, and the paper's column that they belong to.

    Raises `ConfigError` for a file that cannot be read, or is not what it is called.
    """
    kind, _, name = text.partition(":")
    if kind == "random":
        if not name or name in NETWORKS:
            return random_weights(Architecture(name or "resnet50", 1.0, "imagenet"), seed), "random"
        return random_weights(read(spelled_out(name)).architecture, seed), "random"
    if kind == "supervised" and name:
        weights = read(spelled_out(name))
        if weights.kind != "torchvision":
            raise ConfigError(
                f"{name} is a file of {weights.kind}, which trains without labels: name it without "
                "supervised: before it."
            )
        return weights, "supervised"
    return read(spelled_out(text)), "pre-trained"


def parse(parser: CommandParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, those of `--config` first. Raises `ConfigError` for a file that is none."""
    first = CommandParser(parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(list(arguments))
    return parser.parse_args([*_options_in(known.config), *arguments])


def _options_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"The file of options {path} cannot be read: {reason}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options: write lines such as lr: 0.02.")
    options = []
    for name, value in content.items():
        values = value if isinstance(value, list) else [value]
        options += [f"--{name}", *map(str, values)]
    return options


def command(parser: CommandParser, arguments: Sequence[str] | None, work: Work) -> int:
    """Run `work` on every rank; its exit code.

    0 when `work` is done, 2 with a sentence for bad input, 1 if a rank is lost or the loss is no
    number, 75 or 130 after a signal: the same command goes on.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with StopRequest() as request, collectives.naming_failures():
            given = parse(parser, sys.argv[1:] if arguments is None else arguments)
            check_shared(given)
            try:
                world = ranks.start(given.device, Config().run.timeout_s)
            except ValueError as error:
                raise ConfigError(str(error).replace("run.device", "--device")) from error
            host.settle(world.device)
            return 0 if work(given, world, request) else request.code
    except OwnedError as error:
        print(f"fastmoco: {str(error).replace('run.dir', '--out')}", file=sys.stderr, flush=True)
        return 2
    except (ConfigError, OSError, DivergedError, collectives.CollectiveError) as error:
        lost = isinstance(error, collectives.CollectiveError)
        if first or isinstance(error, ALONE):
            print(f"fastmoco: {error}", file=sys.stderr, flush=True)
        return 1 if lost or isinstance(error, DivergedError) else 2
    except KeyboardInterrupt:
        return interrupted()
    finally:
        ranks.stop()
