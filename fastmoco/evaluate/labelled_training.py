"""Training with labels, resumable after every epoch: linear classification and fine-tuning.

Every image counts once per epoch, the incomplete last batch included (ImageNet at batch 256: 5005
steps), whatever the number of ranks; so does every test image. Bad images are left out and counted.

n local batch, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import Loader, build_loader
from fastmoco.evaluate.features import BATCH_SIZE, filled_up, rank_share, without_bad
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.machine.collectives import all_reduce_mean_, barrier, gather_rows
from fastmoco.machine.ranks import World
from fastmoco.weights import files


def crop_and_flip(side: int) -> AugmentConfig:
    """The augmentation of training with labels: RandomResizedCrop of area 0.08-1, and flip."""
    return AugmentConfig(
        image_size=side, min_area=0.08, jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0.5
    )


def names_digest(images: LabelledImages) -> str:
    """SHA-256 of the names, below the folder that all have in common, and labels of the images."""
    paths = [path.absolute() for path in images.paths]
    common = Path(os.path.commonpath({str(path.parent) for path in paths})).parent
    digest = hashlib.sha256()
    for path, label in zip(paths, images.labels.tolist(), strict=True):
        digest.update(os.fsencode(f"{path.relative_to(common)}\0{label}\0"))
    return digest.hexdigest()


def place_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of C classes are not less likely than the label's own, int64.

    logits: (n, C), labels: (n,); or with more dimensions, (n, S, C) and (n, S).

    Equal logits count against the label, and a logit that is not finite puts it last, so a
    classifier that says nothing scores nothing.
    """
    own = logits.gather(-1, labels[..., None])
    return (~(logits < own)).sum(dim=-1) - 1 + (~own[..., 0].isfinite()) * logits.shape[-1]


def new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A classifier that has learned nothing: weights from N(0, 0.01^2), by `seed`, and bias 0."""
    head = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    return head


def keep_result(out: Path, record: dict[str, object]) -> None:
    """Add a line to `results.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


class LabelledTraining:
    """Epochs over labelled images, validated and saved after each.

    What learns says how: `begin_epoch`, `learn`, `logits`, `check`, `state`, `load_state`.
    identity: all that decides the result besides the images; a folder `out` with another is refused
    with `ConfigError`.
    """

    kind: str
    """Of the records: `linear` or `finetune`; also the name of the file of its state."""

    def __init__(
        self,
        train: LabelledImages,
        test: LabelledImages,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        identity: list[object],
        out: Path,
        world: World,
        workers: int = 0,
    ) -> None:
        self.train, self.test, self.world, self.out = train, test, world, out
        self.epochs, self.batch_size, self.seed, self.workers = epochs, batch_size, seed, workers
        self.epoch, self.best, self.last = 0, 0.0, 0.0  # top-1 of the best and of the last epoch
        view = [train.image_size, train.resize, asdict(train.rule)]
        images = [names_digest(train), names_digest(test)]
        self.identity = json.dumps([epochs, batch_size, seed, *identity, *view, *images])
        self._told = 0  # bad test images that the user has heard of

    @property
    def steps_per_epoch(self) -> int:
        """The incomplete last batch counts."""
        return math.ceil(len(self.train) / self.batch_size)

    def learn(self, images: Tensor, labels: Tensor, everyone: int, step: int) -> Tensor:
        """Step number `step` of all epochs: images of this rank as in `Batch`, labels (<= n,).

        The images that have no label only fill up the batch. `everyone` is the number of labels on
        all ranks. Returns (2,): this rank's sum of losses and of hits.
        """
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """(n, C) for n images as in `Batch`, in evaluation mode."""
        raise NotImplementedError

    def rate(self, step: int) -> float:
        """The learning rate of a step, for the record of its epoch."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises where the result of the epoch would mean nothing."""

    def state(self) -> dict[str, Any]:
        """What the next epoch needs besides its number; tensors, numbers and text."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        raise NotImplementedError

    def run(self) -> dict[str, object]:
        """Train what is left of the epochs; the record of the best one, top-1 in [0, 1]."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        with self._loader() as loader:
            while self.epoch < self.epochs:
                record = self._train_epoch(loader)
                self.epoch += 1
                self.check()
                top1, top5 = self.validate()
                self.best, self.last = max(self.best, top1), top1
                record |= {"val_top1": top1, "val_top5": top5, "best_top1": self.best}
                record["bad_samples"] = len(loader.bad_samples.reasons)
                record["bad_test_images"] = len(self.test.bad)
                self._save(record)
        images = {"images": len(self.train), "test_images": len(self.test) - len(self.test.bad)}
        found = {"val_top1": self.best, "last_top1": self.last}
        return {"kind": self.kind, **found, "epochs": self.epoch, **images}

    def _loader(self) -> Loader:
        """The training loader, on a list of the images that keep their label."""
        if self.train.in_table:
            raise ConfigError("Training with labels reads class folders and lists, not tables.")
        names = [str(path.resolve()) for path in self.train.paths]
        for name in names:
            if "\n" in name or "\r" in name or name != os.fsencode(name).decode(errors="replace"):
                raise ConfigError(
                    f"Training with labels cannot list {name!r}: rename it, as its name holds a "
                    "line break or is no UTF-8 text."
                )
        listed = self.out / "images.txt"
        text = "".join(f"{name}\n" for name in names)
        if self.world.is_main and not (listed.exists() and listed.read_text() == text):
            listed.write_text(text)
        barrier(self.world)
        data = DataConfig(source="list", root=str(listed), workers=self.workers, max_bad_share=1.0)
        config = Config(
            run=RunConfig(dir=str(self.out), seed=self.seed),
            data=self.train.rule.into(data),
            augment=crop_and_flip(self.train.image_size),
            optim=OptimConfig(global_batch_size=self.batch_size),
        )
        return build_loader(
            config,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
            labelled=True,
        )

    def _train_epoch(self, loader: Loader) -> dict[str, object]:
        steps, device = loader.steps_per_epoch, self.world.device
        sums = torch.zeros(2, device=device)
        first = self.epoch * steps
        batches = loader.batches(first, first + steps)
        quiet = None if self.world.is_main else True  # None: where standard error is a terminal
        for number, batch in enumerate(
            tqdm(batches, f"epoch {self.epoch + 1}", total=steps, leave=False, disable=quiet)
        ):
            asked = loader.plan.queries(first + number).samples.tolist()
            delivered = dict(batch.replaced.tolist())
            samples = [delivered.get(sample, sample) for sample in asked]
            labels = self.train.labels[samples].to(device)
            rows, everyone = loader.plan.counted(first + number)
            sums += self.learn(batch.im_q, labels[:rows], everyone, first + number)
        all_reduce_mean_([sums], self.world)
        loss, top1 = (sums * self.world.size / len(self.train)).tolist()
        lr = self.rate(first)
        return {"kind": self.kind, "epoch": self.epoch + 1, "lr": lr, "loss": loss, "top1": top1}

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Top-1 and top-5 in [0, 1] over the good test images, each counted once on one rank."""
        device = self.world.device
        share = rank_share(len(self.test), self.world.rank, self.world.size)
        places = [torch.zeros(0, dtype=torch.int64, device=device)]
        start = share.start
        for pixels in self.test.batches(share, BATCH_SIZE):
            labels = self.test.labels[start : start + len(pixels)].to(device)
            logits = self.logits(filled_up(pixels, BATCH_SIZE).to(device))[: len(pixels)]
            places.append(place_of(logits, labels))
            start += len(pixels)
        good = without_bad(torch.cat(places), self.test, self.world)
        if self.world.is_main and len(self.test.bad) > self._told:
            self._told = len(self.test.bad)
            tqdm.write(f"WARNING: {self.test.bad_sentence('test images')}", file=sys.stderr)
        if not len(good.kept):
            raise ConfigError(f"No image can be used: {self.test.bad_sentence('test images')}")
        place = gather_rows(good.features, self.world)
        return float((place < 1).double().mean()), float((place < 5).double().mean())

    def _save(self, record: dict[str, object]) -> None:
        state = self.state()  # on every rank: it may take all to make it
        if self.world.is_main:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            percent = {n: 100 * float(str(record[n])) for n in ("top1", "val_top1", "best_top1")}
            print(
                f"epoch {self.epoch}/{self.epochs}  lr {record['lr']:g}  "
                f"loss {record['loss']:.4f}  train {percent['top1']:.2f} %  "
                f"val {percent['val_top1']:.2f} %  best {percent['best_top1']:.2f} %",
                flush=True,
            )
            place = {"epoch": self.epoch, "best": self.best, "last": self.last}
            content = {"identity": self.identity, **place, **state}
            files.write_torch(self.out / f"{self.kind}.pth.tar", content)
        barrier(self.world)

    def _resume(self) -> None:
        path = self.out / f"{self.kind}.pth.tar"
        if not path.is_file():
            return
        content: dict[str, Any] = files.load(path)
        if content.get("identity") != self.identity:
            raise ConfigError(
                f"{path} is of another checkpoint, data set or schedule: choose another --out."
            )
        self.epoch, self.best = content["epoch"], content["best"]
        self.load_state(content)
        # Files from before 2026-11-27 do not say.
        self.last = content["last"] if "last" in content else self.validate()[0]
