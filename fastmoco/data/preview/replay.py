"""The data of one step in a small file, and the same batch again.

A batch is a function of the configuration, the number of the step and the images. The file has the
first two, and of the images the numbers and a digest, by which others are noticed.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastmoco.config import Config, ConfigError, dump, parse
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, build_loader
from fastmoco.data.plan import Plan
from fastmoco.machine import durable

KIND = "fastmoco step 1"


@dataclass(frozen=True)
class SavedStep:
    """What a file says."""

    config: Config
    step: int
    """Counted from 1, as in the log."""
    samples: list[list[int]]
    """Numbers of the images of all ranks, by micro-batch."""
    images: str
    """Digest of the data set; empty for noise."""


def save(folder: Path, config: Config, loader: Loader, step: int, *, write: bool = True) -> Path:
    """Write down the data of a step, counted from 1; the name of the file.

    Nothing is written unless `write`: one rank does it for all, and a full disk is no error.
    """
    path = folder / f"not_finite_step{step:08d}.json"
    if not write:
        return path
    epoch, _ = loader.plan.locate((step - 1) * loader.plan.accumulate)
    content = {
        "kind": KIND,
        "step": step,
        "epoch": epoch,
        "seed": loader.plan.seed,
        "samples": _samples(loader.plan, step),
        "images": loader.fingerprint.digest if loader.fingerprint else "",
        "config": dump(config),
    }
    with contextlib.suppress(OSError):
        durable.replace(path, lambda partial: partial.write_text(json.dumps(content) + "\n"))
    return path


def _samples(plan: Plan, step: int) -> list[list[int]]:
    whole = replace(plan, rank=0, world_size=1, local_batch=plan.local_batch * plan.world_size)
    first = (step - 1) * plan.accumulate
    return [
        whole.queries(micro_step).samples.tolist()
        for micro_step in range(first, first + plan.accumulate)
    ]


def read(path: Path, options: Sequence[str] = ()) -> SavedStep:
    """The step of a file; `options` change its configuration, as where the images lie now.

    Raises `ConfigError` for a file that is none.
    """
    try:
        content = json.loads(durable.read_regular(path))
        if content["kind"] != KIND:
            raise ValueError(f"it is a {content['kind']}")
        step, samples = int(content["step"]), [[int(n) for n in row] for row in content["samples"]]
        images, text = str(content["images"]), str(content["config"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not the data of a step as a run saves it ({type(error).__name__}: {error})."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.yaml"
        written.write_text(text, encoding="utf-8")
        config = parse(["--config", str(written), *options])
    return SavedStep(config, step, samples, images)


def batches(step: SavedStep, device: torch.device) -> list[Batch]:
    """Its micro-batches, of all ranks in rank order; keys stand beside their queries.

    Where the loader was the shuffle of shuffle-BN, ranks had the same keys in another order.

    Raises `ConfigError` where the images are no longer the same.
    """
    config = step.config
    with build_loader(config, device=device, listed=False) as loader:
        images = loader.fingerprint.digest if loader.fingerprint else ""
        if images != step.images or _samples(loader.plan, step.step) != step.samples:
            raise ConfigError(
                f"The images in {config.data.root or config.data.source} are not those of step "
                f"{step.step}: set --data.root to where they are."
            )
        return list(loader.batches(step.step - 1, step.step))
