"""The console command: `fastmoco VERB OPTIONS`.

A verb is a module with `main(arguments) -> exit code`, imported when it is used: `fastmoco --help`
takes no longer than Python itself. `python -m fastmoco.train` and the like do the same.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fastmoco import __version__
from fastmoco.machine.stopping import exit_code


class Verb(NamedTuple):
    """What a word after `fastmoco` stands for."""

    module: str
    help: str
    configured: bool = False
    """Whether it takes the options of training, `--config FILE` and every field."""
    words: tuple[str, ...] = ()
    """Further options, and arguments with few values, for completion in a shell."""


# Of fastmoco.weights.export, which loads torch.
FORMATS = ("torchvision", "timm", "detectron2", "official", "safetensors", "hub-folder")

VERBS = {
    "train": Verb("fastmoco.train", "pre-train an encoder; without options, the demo", True),
    "doctor": Verb(
        "fastmoco.doctor.__main__", "what this machine has and what limits a run on it", True
    ),
    "preview": Verb(
        "fastmoco.data.preview.__main__",
        "draw the views that a run would see",
        True,
        ("--out", "--samples", "--replay"),
    ),
    "inspect": Verb(
        "fastmoco.data.inspect.__main__",
        "what is in a data set, and the settings to train on it",
        True,
        ("--html", "--samples"),
    ),
    "prepare": Verb(
        "fastmoco.data.download",
        "download a public data set as folders of images",
        words=("cifar10", "imagenette", "stl10", "--out"),
    ),
    "shapes": Verb(
        "fastmoco.transfer.datasets.write_shapes",
        "draw a set to try detection and segmentation on",
        words=("--out", "--photographs", "--pretrain"),
    ),
    "pack": Verb(
        "fastmoco.data.pack.__main__",
        "lay images into tar shards, no larger than training needs",
        True,
        ("--out", "--short-side", "--quality", "--shard-samples"),
    ),
    "knn": Verb(
        "fastmoco.evaluate.knn",
        "kNN accuracy of a frozen encoder on labelled images",
        words=("--checkpoint", "--data.root", "--k"),
    ),
    "embed": Verb(
        "fastmoco.evaluate.embed",
        "features of all images, with file names, in a file",
        words=("--data.root", "--data.source", "--out"),
    ),
    "export": Verb(
        "fastmoco.weights.export",
        "carry an encoder to torchvision, timm, Detectron2 and others",
        words=("--to", "--out", *FORMATS),
    ),
    "finetune": Verb(
        "fastmoco.evaluate.finetune",
        "train the whole network on labels",
        words=("--checkpoint", "--data.root", "--labels", "--layer_decay", "--out"),
    ),
    "detect": Verb(
        "fastmoco.transfer.detect",
        "train a detector on a trunk, and test it",
        words=("--checkpoint", "--data.root", "--arch", "--task", "--config", "--out"),
    ),
    "segment": Verb(
        "fastmoco.transfer.segment",
        "train semantic segmentation on a trunk, and test it",
        words=("--checkpoint", "--data.root", "--crop", "--config", "--out"),
    ),
    "retrieval": Verb(
        "fastmoco.evaluate.retrieval",
        "mAP and a picture of nearest images",
        words=("--checkpoint", "--data.root"),
    ),
    "linear": Verb(
        "fastmoco.evaluate.linear.__main__",
        "linear classification on a frozen encoder",
        words=("--checkpoint", "--data.root", "--cached", "--crops", "--labels", "--out"),
    ),
    "experiment": Verb(
        "fastmoco.experiments.__main__",
        "a named grid of runs, drawn beside the paper's numbers",
        words=("--data.root", "--budget", "--out", "--jobs", "mini", "momentum", "mechanism"),
    ),
    "report": Verb(
        "fastmoco.report", "one page about a run, or several compared", words=("--out",)
    ),
    "completion": Verb(
        "fastmoco.completion", "print a script for your shell", words=("bash", "fish", "zsh")
    ),
}


def usage() -> str:
    """What `fastmoco --help` prints."""
    verbs = "\n".join(f"  {name:11s} {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: fastmoco VERB [OPTIONS]\n\n{verbs}\n\n"
        "fastmoco VERB --help lists the options of a verb, fastmoco --version the version.\n"
        "On several GPUs: torchrun --nproc_per_node=8 -m fastmoco.train OPTIONS."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the verb; 2, with one sentence, for a verb that there is not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] == "--version":
        print(f"fastmoco {__version__}")
        return 0
    name, *rest = given
    if name not in VERBS:
        print(f"fastmoco: {_unknown(name)}", file=sys.stderr)
        return 2
    verb = importlib.import_module(VERBS[name].module)
    return exit_code(lambda: int(verb.main(rest)))


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"{name} comes without a verb: fastmoco train {name} ... trains (fastmoco --help)."
    near = difflib.get_close_matches(name, VERBS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(VERBS)}."
    return f"there is no verb {name}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
