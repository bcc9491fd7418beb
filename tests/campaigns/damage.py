"""Damaged, foreign and hostile files: each is refused in a sentence, or made good, never believed.

    python tests/campaigns/damage.py --cases 200 [--seed 0] [--only N]

A run that was killed half-way is copied, one of its files or of its cache or data is changed, and
the same command is given. Good ends are: refused with a sentence; gone on after a warning, with
the weights of an undisturbed run; or the same run in every respect, as where a cache is made anew.
"""

from __future__ import annotations

import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaigns import runs

if TYPE_CHECKING:
    from tests.campaigns.campaign import Campaign
    from tests.campaigns.mutations import Mutation

LIMIT_S = 240.0
"""A damaged run that takes longer hangs; an undisturbed one takes seconds."""
SHARD = "shard.tar"


@dataclass(frozen=True)
class Target:
    """A file that is changed, how, and how often among all cases."""

    name: str
    find: Callable[[Path, random.Random], Path]
    """The file, below the folder of a case."""
    kinds: dict[str, Mutation]
    weight: int
    shards: bool = False


def _one(pattern: str) -> Callable[[Path, random.Random], Path]:
    def find(place: Path, draw: random.Random) -> Path:
        return draw.choice(sorted(path for path in place.glob(pattern) if path.is_file()))

    return find


def _newest(place: Path, draw: random.Random) -> Path:
    return max((place / "run").glob("checkpoint_*"))


def targets() -> list[Target]:
    """What is damaged. Paths are below the folder of a case: `run`, `cache`, `data`."""
    from tests.campaigns.mutations import BYTES, NAMES, TENSORS, TEXT

    every = BYTES | NAMES
    return [
        Target("newest checkpoint", _newest, BYTES | TENSORS | NAMES, 6),
        Target("every checkpoint", _newest, BYTES | TENSORS, 3),
        Target("config.yaml", _one("run/config.yaml"), every | TEXT, 3),
        Target("metrics.jsonl", _one("run/metrics.jsonl"), every | TEXT, 3),
        Target("latest.pth.tar", _one("run/latest.pth.tar"), every, 1),
        Target("owner.json", _one("run/owner.json"), every | TEXT, 1),
        Target("bad_samples.jsonl", _one("run/bad_samples.jsonl"), every | TEXT, 1),
        Target("index of images", _one("cache/index/*[!k]"), every | TEXT, 2),
        Target("compiled kernels", _one("cache/kernels*/*.so"), every, 1),
        Target("tar shard", _one(f"data/{SHARD}"), every, 2, shards=True),
        Target("index of a shard", _one("data/*-index"), every | TEXT, 2, shards=True),
    ]


def pack(images: Path, shard: Path) -> list[str]:
    """The pictures in a tar file, and the options that name it."""
    shard.parent.mkdir(exist_ok=True)
    with tarfile.open(shard, "w") as archive:
        for picture in sorted(images.rglob("*.jpg")):
            archive.add(picture, f"{picture.parent.name}/{picture.name}")
    bank = f"--knn.train_root={images}"
    return ["--data.source=shards", bank, f"--data.root={shard}"]


class Cases:
    """A killed run on pictures, one on a shard, and copies of them to damage."""

    def __init__(self, campaign: Campaign) -> None:
        from tests.campaigns.verdict import end_of

        self.campaign, self.place = campaign, campaign.place
        campaign.begin_half("half")
        self.plain = campaign.options
        packed = pack(self.place / "images" / "train", self.place / "packed" / SHARD)
        self.packed = [*self.plain, *packed[:2]]
        campaign.options = [*self.plain, *packed]
        campaign.start("whole_shards").finish()
        self.ends = {False: campaign.whole, True: end_of(self.place / "whole_shards")}
        campaign.begin_half("half_shards")

    def prepare(self, target: Target, number: int) -> Path:
        """The folder of a case, with a run to go on, its cache and its data."""
        place = self.place / f"case{number}"
        half = "half_shards" if target.shards else "half"
        for source, name in ((half, "run"), ("cache", "cache"), ("packed", "data")):
            shutil.copytree(self.place / source, place / name, symlinks=True)
        return place

    def judge(self, target: Target, kind: str, number: int, seed: int) -> tuple[str, list[str]]:
        """How the run on a damaged file ended, and what is wrong about that."""
        from tests.campaigns.mutations import EXECUTED
        from tests.campaigns.verdict import differences, traced

        draw, place = random.Random(f"{seed} {number}"), self.prepare(target, number)
        path = target.find(place, draw)
        target.kinds[kind](path, draw)
        if target.name.startswith("every"):
            for other in path.parent.glob("checkpoint_*"):
                if other != path:
                    target.kinds[kind](other, draw)
        shard = f"--data.root={place / 'data' / SHARD}"
        self.campaign.options = [*self.packed, shard] if target.shards else self.plain
        cache = {"FASTMOCO_CACHE": str(place / "cache")}
        life = self.campaign.start(f"case{number}/run", cache).finish(LIMIT_S)
        code, text = next(iter(life.codes.values())), life.text
        wrong = ["hangs"] * life.hung + traced(text)
        wrong += [f"code from {p.parent.name} was executed" for p in place.rglob(EXECUTED)]
        if not code:
            odd = differences(place / "run", self.ends[target.shards])
            told = "WARNING" in text
            worse = [o for o in odd if not told or "tensors" in o or "cannot be read" in o]
            wrong += [f"accepted: {'; '.join(worse)}"] * bool(worse)
            outcome = "went on with a warning" if told else "same as undamaged"
        else:
            outcome = "refused in a sentence"
            if code not in (1, 2) or "fastmoco: " not in text:
                wrong.append(f"exit code {code} without a sentence")
        return outcome, wrong


def plan(seed: int, cases: int) -> list[tuple[Target, str]]:
    """Of each case the target and the kind of damage; every kind in turn, in a drawn order."""
    known = [target for target in targets() for _ in range(target.weight)]
    kinds = {
        t.name: random.Random(f"{seed} {t.name}").sample(sorted(t.kinds), len(t.kinds))
        for t in known
    }
    chosen, used = [], dict.fromkeys(kinds, 0)
    for number in range(cases):
        target = known[number * 7 % len(known)]
        names = kinds[target.name]
        chosen.append((target, names[used[target.name] % len(names)]))
        used[target.name] += 1
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if any damage did harm."""
    parser = runs.parser(__doc__, "--cases", 200)
    options = parser.parse_args(arguments)
    place = runs.begin(sys.argv)
    from tests.campaigns.campaign import Campaign
    from tests.campaigns.verdict import Table

    cases = Cases(Campaign(place))
    table = Table("damage", f"damage.py --cases {options.cases} --seed {options.seed}")
    for number, (target, kind) in enumerate(plan(options.seed, options.cases)):
        if options.only not in (-1, number):
            continue
        outcome, wrong = cases.judge(target, kind, number, options.seed)
        wrong = [f"{kind}: {text}" for text in wrong]
        table.add(target.name, wrong, again=f"--only {number}", outcome=outcome)
        if options.keep and (wrong or options.only == number):
            runs.show(place / f"case{number}" / "run.txt")
        runs.forget(place / f"case{number}")
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
