"""Carry an encoder to other programs.

    fastmoco export CHECKPOINT --to FORMAT --out PATH

CHECKPOINT is any file, run or hub folder that `fastmoco.weights.read` knows. The formats:

* torchvision, timm: the trunk as a plain state dict, by the suffix of PATH `.safetensors` or
  what `torch.save` writes;
* safetensors: the trunk, with architecture, stem and epoch in the header;
* detectron2: the pickle of the official converter;
* official: what the official MoCo scripts read; of our and of official checkpoints everything,
  which `main_moco.py --resume` goes on from, of other files encoder_q alone;
* hub-folder: a folder with weights, configuration and model card for `timm.create_model`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastmoco.config import ConfigError, DataConfig
from fastmoco.config.command import CommandParser
from fastmoco.machine.stopping import exit_code
from fastmoco.method.moco import MoCo
from fastmoco.weights.architecture import recognize
from fastmoco.weights.files import load, locate, write_safetensors, write_torch
from fastmoco.weights.formats.constructors import loading_lines
from fastmoco.weights.formats.detectron2 import write_detectron2
from fastmoco.weights.formats.hub import header, write_hub_folder
from fastmoco.weights.formats.official import is_complete, official_optimizer
from fastmoco.weights.read import Weights, interpret

Lines = list[str]
"""What is printed after an export: lines of Python that load it, or a sentence."""


def _write_state(weights: Weights, path: Path) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, weights.trunk, header(weights))
    else:
        write_torch(path, weights.trunk)


def _to_library(library: str, weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    if not weights.architecture.is_common:
        raise ConfigError(
            f"{library} has no {weights.architecture} (its wide ResNets widen other layers): "
            "export with --to safetensors and load that with fastmoco.load_encoder."
        )
    _write_state(weights, out)
    return loading_lines(weights.architecture, out, library)


def _to_torchvision(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    return _to_library("torchvision", weights, content, out)


def _to_timm(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    return _to_library("timm", weights, content, out)


def _to_safetensors(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} must end in .safetensors, by which readers know the file.")
    _write_state(weights, out)
    return loading_lines(weights.architecture, out, "timm")


def _to_detectron2(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    if out.suffix != ".pkl":
        raise ConfigError(f"--out {out} must end in .pkl, by which Detectron2 knows the file.")
    write_detectron2(weights, out)
    return [f"Detectron2: MODEL.WEIGHTS {out}, INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False"]


def _to_official(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    if is_complete(content):
        optimizer = official_optimizer(content["optimizer"], content["state_dict"])
        write_torch(out, {**content, "optimizer": optimizer})
        return [f"everything is in {out}: main_moco.py --resume and main_lincls.py read it"]
    state = {f"module.encoder_q.{n}": t for n, t in {**weights.trunk, **weights.head}.items()}
    write_torch(
        out, {"epoch": weights.epoch or 0, "arch": weights.architecture.arch, "state_dict": state}
    )
    return [f"encoder_q alone is in {out}: main_lincls.py reads it, main_moco.py --resume does not"]


def _to_hub_folder(weights: Weights, content: dict[str, Any], out: Path) -> Lines:
    write_hub_folder(weights, out)
    return [f'model = timm.create_model("local-dir:{out}", pretrained=True)']


FORMATS: dict[str, Callable[[Weights, dict[str, Any], Path], Lines]] = {
    "torchvision": _to_torchvision,
    "timm": _to_timm,
    "detectron2": _to_detectron2,
    "official": _to_official,
    "safetensors": _to_safetensors,
    "hub-folder": _to_hub_folder,
}


def export(checkpoint: Path, to: str, out: Path) -> list[str]:
    """Write `checkpoint` to `out` in one of `FORMATS`; what was read, then how to load the copy.

    Raises `ConfigError` if the checkpoint cannot be read or the format cannot hold it.
    """
    file = locate(checkpoint)
    content = load(file)
    weights = interpret(content, file)
    return [weights.describe(), *FORMATS[to](weights, content, out)]


def export_trunk(moco: MoCo, folder: Path, epoch: int, data: DataConfig) -> str:
    """Write `encoder.safetensors` and `encoder.pth` of a run; the lines that load them, as text.

    Raises `ConfigError` if they cannot be written.
    """
    state = {n: t.detach().cpu().contiguous() for n, t in moco.encoder_q.state_dict().items()}
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    path = folder / "encoder.safetensors"
    built = recognize(trunk, str(path))
    weights = Weights(path, "fastmoco", built, trunk, {}, epoch, None, data)
    _write_state(weights, path)
    _write_state(weights, folder / "encoder.pth")
    lines = loading_lines(weights.architecture, folder / "encoder.pth", "torchvision")
    return "\n    ".join([f"the encoder is in {path} and encoder.pth; to load it:", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when exported, 2 for a file that cannot be."""
    parser = CommandParser(
        prog="fastmoco export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="file of weights, or run directory")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format")
    parser.add_argument("--out", type=Path, required=True, help="file, or folder of hub-folder")
    given = parser.parse_args(arguments)
    try:
        for line in export(given.checkpoint, given.to, given.out):
            print(line)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
