"""A disk that is full, fails or tears writes, then the same command: is the run what it would be?

    python tests/campaigns/disk.py --cases 50 [--seed 0] [--only N]

From a random operation on a file of the run on, one, three or all further operations of some kinds
fail: ENOSPC, EIO or EROFS, and of a torn write half is done. Every second run has checkpoints
before that. The life with the faults ends well or with a sentence, and no checkpoint from before
may be lost; the next life, on a good disk, ends as an undisturbed run.
"""

from __future__ import annotations

import errno
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaigns import runs

if TYPE_CHECKING:
    from tests.campaigns.campaign import Campaign

KINDS = (("open",), ("write",), ("fsync",), ("rename",), ("open", "write", "fsync", "rename"))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
ALL = 10**9


@dataclass(frozen=True)
class Fault:
    """A function of the seed and its number."""

    kinds: tuple[str, ...]
    share: float
    times: int
    error: int
    torn: bool
    begun: bool

    def setting(self, operations: dict[str, int]) -> str:
        """Of this fault, as `disk_faults.c` reads it."""
        kinds = sum(runs.OPERATIONS[kind] for kind in self.kinds)
        of_run = sum(operations[kind] for kind in self.kinds)
        first = 1 + int(self.share * of_run / (2 if self.begun else 1))
        return f"{kinds} {first} {self.times} {self.error} {'torn' if self.torn else 'whole'}"

    @property
    def name(self) -> str:
        """Its row in the table."""
        kind = "all" if len(self.kinds) > 1 else self.kinds[0]
        return f"{errno.errorcode[self.error]} of {kind}{', torn' * self.torn}"


def fault(seed: int, number: int) -> Fault:
    """The fault of one case."""
    draw = random.Random(f"{seed} {number}")
    kinds = KINDS[number % len(KINDS)]
    torn = "write" in kinds and draw.random() < 0.5
    error = errno.EIO if torn and draw.random() < 0.5 else draw.choice(ERRORS)
    times = draw.choice((1, 3, ALL))
    return Fault(kinds, draw.random(), times, error, torn, number // len(KINDS) % 2 == 0)


def newest(folder: Path) -> int:
    """Steps of the newest checkpoint that can be read; -1 for none."""
    from fastmoco.config import ConfigError
    from fastmoco.weights import files

    for path in files.checkpoints(folder):
        try:
            files.load(path)
        except ConfigError:
            continue
        return files.steps_in(path)
    return -1


def suffer(campaign: Campaign, number: int, seed: int) -> tuple[str, str, list[str]]:
    """The kind of the fault, how the life with it ended, and what is wrong."""
    from tests.campaigns.verdict import differences

    name, one = f"run{number}", fault(seed, number)
    folder, wrong = campaign.place / name, list[str]()
    if one.begun:
        shutil.copytree(campaign.place / "half", folder, symlinks=True)
    before = newest(folder)
    life = campaign.start(name, {"DISK_FAULT": one.setting(campaign.operations)}).finish()
    code, text = next(iter(life.codes.values())), life.text
    wrong += ["hangs"] * life.hung
    if code not in (0, 1, 2):
        wrong.append(f"exit code {code}")
    if code and "fastmoco: " not in text:
        wrong.append(f"exit code {code} without a sentence")
    if not code and "WARNING" not in text and (lacks := differences(folder, campaign.whole)):
        wrong.append(f"reports success: {lacks}")
    if newest(folder) < before:
        wrong.append(f"step {before} is lost")
    ends, last = campaign.last_life(name)
    outcome = "went on" if not code else "ended with a sentence"
    return one.name, outcome, wrong + ends + campaign.verdict(name, {*life.pids, *last})


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if any run was not as it should be."""
    parser = runs.parser(__doc__, "--cases", 50)
    options = parser.parse_args(arguments)
    place = runs.begin(sys.argv)
    from tests.campaigns.campaign import Campaign
    from tests.campaigns.verdict import Table

    campaign = Campaign(place)
    campaign.begin_half("half")
    table = Table("disk", f"disk.py --seed {options.seed}")
    for number in range(options.cases) if options.only < 0 else [options.only]:
        kind, outcome, wrong = suffer(campaign, number, options.seed)
        table.add(kind, wrong, again=f"--only {number}", outcome=outcome)
        if wrong and options.keep:
            runs.show(place / f"run{number}.txt")
        campaign.forget(f"run{number}")
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
