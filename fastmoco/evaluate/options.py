"""What the commands of this room have in common: options, the frozen trunk, the view, the ranks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, KnnConfig, parse_text
from fastmoco.config.command import CommandParser
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.sources.choose import OPEN, resolve_folders
from fastmoco.evaluate.features import BATCH_SIZE, FrozenTrunk
from fastmoco.machine import collectives, host, ranks
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import interrupted
from fastmoco.method.agreement import ALONE
from fastmoco.network.encoder import pixel_statistics
from fastmoco.weights.read import Weights, read


def evaluation_parser(prog: str, description: str, *, positional: bool = False) -> CommandParser:
    """The shared options; `positional` takes the checkpoint as the first argument."""
    parser = CommandParser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    what = "any file, run or folder of weights that fastmoco reads"
    if positional:
        add("checkpoint", type=Path, help=what)
    else:
        add("--checkpoint", type=Path, required=True, help=what)
    add("--data.root", dest="root", default="", help="images, as for training")
    add(
        "--data.source",
        dest="source",
        default="folder",
        choices=(*OPEN, "demo"),
    )
    view_options(parser)
    add("--batch_size", type=int, default=BATCH_SIZE, help="rows of a forward pass")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="fp32",
        help="fp32 gives the features of linear classification, on every machine alike",
    )
    return parser


def view_options(parser: CommandParser) -> None:
    """What decides how a file is shown to the network, see `View`."""
    add = parser.add_argument
    add("--data.max_pixels", dest="max_pixels", type=int, help="default: as the run had it")
    add("--data.any_name", dest="any_name", choices=("true", "false"), default="false")
    add("--resize", type=int, default=0, help="shorter edge; 0: the run's, or 8/7 of the size")
    add("--image_size", type=int, default=0, help="side of the crop; 0: the run's, or 224")


def labelled_options(parser: CommandParser) -> None:
    """Folders of labelled images, resolved as those of the monitor."""
    parser.add_argument("--train", default="", help="class folders of the bank; else from the root")
    parser.add_argument("--test", default="", help="class folders to classify; else from the root")


@dataclass(frozen=True)
class View:
    """How an image file is shown to a network: as in its run, where the command says no other."""

    resize: int
    """Shorter edge before the centre crop."""
    image_size: int
    """Side of the crop."""
    data: DataConfig
    """How the run read its files."""

    @classmethod
    def of(cls, given: argparse.Namespace, weights: Weights) -> View:
        """The options of `view_options`, else the run's, else 256 and 224 and the usual pixels.

        Raises `ConfigError`.
        """
        if given.image_size < 0 or given.resize < 0:
            raise ConfigError("--image_size and --resize must be 0 or more.")
        run = parse_text(weights.config) if weights.config else None
        size = given.image_size or (run or Config()).augment.image_size
        same = run is not None and size == run.augment.image_size
        resize = given.resize or (run.knn.resize if run and same else size * 8 // 7)
        resize = resize if given.resize else max(resize, size)
        if resize < size:
            raise ConfigError(
                f"--resize {resize} is smaller than --image_size {size}, so the centre crop would "
                f"reach beyond the image: set it to at least {size}."
            )
        data = weights.pixels
        if given.max_pixels is not None:
            if given.max_pixels < 1:
                raise ConfigError("--data.max_pixels must be at least 1.")
            data = replace(data, max_pixels=given.max_pixels)
        return cls(resize, size, data)

    @property
    def rule(self) -> PixelRule:
        """How bytes become pixels."""
        return PixelRule.of(self.data)


@dataclass(frozen=True)
class Evaluation:
    """A frozen trunk and the view that it is shown."""

    weights: Weights
    trunk: FrozenTrunk
    view: View
    precision: str

    @classmethod
    def of(cls, given: argparse.Namespace, world: World) -> Evaluation:
        """Read the checkpoint. Raises `ConfigError`."""
        if given.batch_size < 1:
            raise ConfigError("--batch_size must be at least 1.")
        weights = read(given.checkpoint)
        view = View.of(given, weights)
        precision = choose_precision(given.precision, world.device)
        trunk = FrozenTrunk.of(weights, precision.dtype, world.device)
        return cls(weights, trunk, view, str(precision))

    def describe(self) -> str:
        """What is evaluated, in two lines."""
        return (
            f"{self.weights.describe()}\n"
            f"view: shorter edge {self.view.resize}, centre crop {self.view.image_size}; "
            f"{self.precision}"
        )

    def labelled_roots(self, given: argparse.Namespace) -> tuple[Path, Path]:
        """Folders of bank and test images, as the monitor of a run finds them.

        Raises `ConfigError` where there are none.
        """
        knn = resolve_folders(self.sources(given, every=1)).knn
        return Path(knn.train_root), Path(knn.test_root)

    def sources(self, given: argparse.Namespace, every: int = 0) -> Config:
        """The configuration that names the images of the command line."""
        return Config(
            data=replace(
                self.view.data,
                source=given.source,
                root=given.root,
                any_name=given.any_name == "true",
            ),
            augment=AugmentConfig(image_size=self.view.image_size),
            knn=KnnConfig(
                every=every,
                train_root=getattr(given, "train", ""),
                test_root=getattr(given, "test", ""),
            ),
        )


def untrained(evaluation: Evaluation, world: World, seed: int = 0) -> FrozenTrunk:
    """The same architecture with random weights: what training has to beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = evaluation.weights.architecture.encoder().to(world.device).eval()
    statistics = pixel_statistics(evaluation.view.data)
    return FrozenTrunk(encoder, evaluation.trunk.precision, world.device, statistics)


def command(
    parser: CommandParser,
    arguments: Sequence[str] | None,
    work: Callable[[argparse.Namespace, World], None],
) -> int:
    """Run `work` on every rank; 0, 2 with a sentence for bad input, 1 if a rank is lost."""
    given = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    first = os.environ.get("RANK", "0") == "0"
    try:
        try:
            world = ranks.start(given.device, Config().run.timeout_s)
        except ValueError as error:
            raise ConfigError(str(error).replace("run.device", "--device")) from error
        host.settle(world.device)
        with collectives.naming_failures(world, lambda: 0):
            work(given, world)
    except (ConfigError, OSError, collectives.CollectiveError) as error:
        lost = isinstance(error, collectives.CollectiveError)
        if first or isinstance(error, ALONE):
            print(f"fastmoco: {error}", file=sys.stderr, flush=True)
        return 1 if lost else 2
    except KeyboardInterrupt:
        return interrupted()
    finally:
        ranks.stop()
    return 0
