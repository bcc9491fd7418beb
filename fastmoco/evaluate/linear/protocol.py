"""Linear classification to the letter of the published protocol, resumable after every epoch.

Source: the official `main_lincls.py`, with the incomplete last batch of every epoch (ImageNet: 5005
steps). One difference: where ranks do not divide that batch, the official sampler repeats images;
here each image counts once, in training and in validation.

n local batch, D feature dimension, C classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmoco.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import Loader, build_loader
from fastmoco.evaluate.features import BATCH_SIZE, filled_up, rank_share, without_bad
from fastmoco.evaluate.labelled_images import LabelledImages
from fastmoco.evaluate.linear.cached import Schedule
from fastmoco.evaluate.linear.frozen import FrozenTrunk, crop_and_flip
from fastmoco.machine.collectives import all_reduce_mean_, barrier, gather_rows
from fastmoco.machine.ranks import World
from fastmoco.weights import files


class TrunkChangedError(RuntimeError):
    """The frozen trunk is not what it was: the accuracy would mean nothing."""


def names_digest(images: LabelledImages) -> str:
    """SHA-256 of the names, below the folder that all have in common, and labels of the images."""
    paths = [path.absolute() for path in images.paths]
    common = Path(os.path.commonpath({str(path.parent) for path in paths})).parent
    digest = hashlib.sha256()
    for path, label in zip(paths, images.labels.tolist(), strict=True):
        digest.update(os.fsencode(f"{path.relative_to(common)}\0{label}\0"))
    return digest.hexdigest()


def place_of(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 (n,): how many classes of (n, C) are not less likely than the label's own.

    Equal logits count against the label, and a logit that is not finite puts it last, so a
    classifier that says nothing scores nothing.
    """
    own = logits.gather(1, labels[:, None])
    return (~(logits < own)).sum(dim=1) - 1 + (~own[:, 0].isfinite()) * logits.shape[1]


class Protocol:
    """One linear layer on the frozen trunk: lr 30, momentum 0.9, no weight decay, steps 60 and 80.

    Raises `ConfigError` for too few images, or an `out` that holds another classification.
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        train: LabelledImages,
        test: LabelledImages,
        schedule: Schedule,
        *,
        lr: float,
        out: Path,
        world: World,
        workers: int = 0,
    ) -> None:
        self.trunk, self.train, self.test, self.world, self.out = trunk, train, test, world, out
        self.schedule, self.lr = schedule, lr
        self.fc = nn.Linear(trunk.weights.features, len(train.class_names))
        generator = torch.Generator().manual_seed(schedule.seed)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=generator) * 0.01)
            self.fc.bias.zero_()
        self.fc.to(world.device)
        self.optimizer = torch.optim.SGD(
            self.fc.parameters(), lr, momentum=schedule.momentum, weight_decay=0.0
        )
        self.before = trunk.fingerprint()
        self.epoch, self.best, self.workers = 0, 0.0, workers
        names = [names_digest(train), names_digest(test)]
        self.identity = json.dumps(
            [asdict(schedule), lr, self.before, train.image_size, train.resize, *names]
        )
        self._told = 0  # bad test images that the user has heard of

    def run(self) -> dict[str, object]:
        """Train what is left of the schedule; the record of the best epoch, top-1 in [0, 1]."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        with self._loader() as loader:
            while self.epoch < self.schedule.epochs:
                record = self._train_epoch(loader)
                self.epoch += 1
                if self.trunk.fingerprint() != self.before:
                    raise TrunkChangedError(
                        "the frozen trunk has changed while its classifier learned"
                    )
                top1, top5 = self.validate()
                self.best = max(self.best, top1)
                record |= {"val_top1": top1, "val_top5": top5, "best_top1": self.best}
                record["bad_samples"] = len(loader.bad_samples.reasons)
                record["bad_test_images"] = len(self.test.bad)
                self._save(record)
        return {
            "kind": "linear",
            "lr": self.lr,
            "weight_decay": 0.0,
            "val_top1": self.best,
            "epochs": self.epoch,
            "images": len(self.train),
        }

    def _loader(self) -> Loader:
        """The training loader, on a list of the images that keep their label."""
        listed = self.out / "images.txt"
        text = "".join(f"{path.resolve()}\n" for path in self.train.paths)
        if self.world.is_main and not (listed.exists() and listed.read_text() == text):
            listed.write_text(text)
        barrier(self.world)
        config = Config(
            run=RunConfig(dir=str(self.out), seed=self.schedule.seed),
            data=DataConfig(
                source="list", root=str(listed), workers=self.workers, max_bad_share=1.0
            ),
            augment=crop_and_flip(self.train.image_size),
            optim=OptimConfig(global_batch_size=self.schedule.batch_size),
        )
        return build_loader(
            config,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
            labelled=True,
        )

    def _train_epoch(self, loader: Loader) -> dict[str, object]:
        lr = self.lr * self.schedule.factor(self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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
            features = self.trunk(batch.im_q)[:rows]
            sums += self.step(features, labels[:rows], everyone)
        all_reduce_mean_([sums], self.world)
        loss, top1 = (sums * self.world.size / len(self.train)).tolist()
        return {"kind": "linear", "epoch": self.epoch + 1, "lr": lr, "loss": loss, "top1": top1}

    def step(self, features: Tensor, labels: Tensor, everyone: int) -> Tensor:
        """One step of SGD on (n, D) of every rank, `everyone` rows of all ranks together.

        n may be another on each rank, and 0. Returns (2,): this rank's sum of losses and of hits.
        """
        logits = self.fc(features)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        self.optimizer.zero_grad()
        (loss * self.world.size / everyone).backward()  # the mean over ranks is that over rows
        gradients = [p.grad for p in self.fc.parameters() if p.grad is not None]
        all_reduce_mean_(gradients, self.world)
        self.optimizer.step()
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Top-1 and top-5 in [0, 1] over the good test images, each counted once on one rank."""
        device = self.world.device
        share = rank_share(len(self.test), self.world.rank, self.world.size)
        places = [torch.zeros(0, dtype=torch.int64, device=device)]
        start = share.start
        for pixels in self.test.batches(share, BATCH_SIZE):
            labels = self.test.labels[start : start + len(pixels)].to(device)
            features = self.trunk(filled_up(pixels, BATCH_SIZE).to(device))[: len(pixels)]
            places.append(place_of(self.fc(features), labels))
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
        if self.world.is_main:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            percent = {n: 100 * float(str(record[n])) for n in ("top1", "val_top1", "best_top1")}
            print(
                f"epoch {self.epoch}/{self.schedule.epochs}  lr {record['lr']:g}  "
                f"loss {record['loss']:.4f}  train {percent['top1']:.2f} %  "
                f"val {percent['val_top1']:.2f} %  best {percent['best_top1']:.2f} %",
                flush=True,
            )
            content = {
                "identity": self.identity,
                "epoch": self.epoch,
                "best": self.best,
                "fc": self.fc.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            files.write_torch(self.out / "linear.pth.tar", content)
        barrier(self.world)

    def _resume(self) -> None:
        path = self.out / "linear.pth.tar"
        if not path.is_file():
            return
        content: dict[str, Any] = files.load(path)
        if content.get("identity") != self.identity:
            raise ConfigError(
                f"{path} is of another checkpoint, data set or schedule: choose another --out."
            )
        self.epoch, self.best = content["epoch"], content["best"]
        self.fc.load_state_dict(content["fc"])
        self.optimizer.load_state_dict(content["optimizer"])
