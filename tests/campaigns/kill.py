"""SIGKILL at random moments, then the same command, until it ends: is the run what it would be?

    python tests/campaigns/kill.py --kills 50 [--ranks 2] [--seed 0] [--only N]

Of the kills, one half comes by the clock and the other at a random operation on a file of the run
or of the cache: before it opens, writes, flushes or renames something.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaigns import runs

OPERATIONS = {"open": 1, "write": 2, "fsync": 4, "rename": 8}


@dataclass
class Plan:
    """One run and how it is disturbed; a function of the seed and its number."""

    number: int
    kills: list[tuple[str, float, int]] = field(default_factory=list)
    """Of each: `clock` or an operation, the share of the run before it, and the rank."""


def plans(seed: int, kills: int, ranks: int) -> list[Plan]:
    """So many runs that the kills add up, one to three in each."""
    made: list[Plan] = []
    left = kills
    while left > 0:
        draw = random.Random(f"{seed} {len(made)}")
        count = min(left, draw.choice((1, 1, 2, 3)))
        plan = Plan(len(made))
        for _ in range(count):
            how = draw.choice(["clock"] * 4 + list(OPERATIONS))
            plan.kills.append((how, draw.random(), draw.randrange(-1, ranks) if ranks > 1 else 0))
        made.append(plan)
        left -= count
    return made


class Campaign:
    """What the runs of a campaign share."""

    def __init__(self, place: Path, ranks: int) -> None:
        from fastmoco.train import main
        from tests.campaigns.verdict import end_of

        self.main, self.place, self.ranks = main, place, ranks
        self.options = [*runs.SMALL, *runs.pictures(place / "images")]
        began = time.monotonic()
        for name in ("first", "whole"):  # the first compiles, so the second tells the time
            began = time.monotonic()
            life = self.start(name).finish()
            if set(life.codes.values()) != {0}:
                sys.exit(f"an undisturbed run fails:\n{life.text[-3000:]}")
        self.seconds = time.monotonic() - began
        self.whole = end_of(place / "whole")
        self.cached = self.cache()
        self.operations = self._count()

    def cache(self) -> set[str]:
        """Names of the files in the cache."""
        cache = self.place / "cache"
        return {str(path.relative_to(cache)) for path in cache.rglob("*")}

    def start(self, name: str, environment: tuple[dict[str, str], ...] = ({},)) -> runs.Life:
        """A life of the run with this name."""
        return runs.start(
            self.main,
            [*self.options, f"--run.dir={self.place / name}"],
            self.place / f"{name}.txt",
            ranks=self.ranks,
            environment=environment,
        )

    def _count(self) -> dict[str, int]:
        """Operations of each kind in an undisturbed run; of rank 0, which writes the files."""
        log = self.place / "operations"
        recorded = {"DISK_ROOT": str(self.place / "counted"), "DISK_LOG": str(log)}
        self.start("counted", (recorded, {})).finish()
        kinds = {"create": "open", "truncate": "open", "write": "write", "fsync": "fsync"}
        names = [kinds.get(line.split("\t")[0], "rename") for line in log.read_text().splitlines()]
        return {name: names.count(name) for name in OPERATIONS}

    def live(self, plan: Plan) -> tuple[int, list[str], set[int]]:
        """Kills delivered, what the outputs show, and the sessions of the processes."""
        name, delivered, sessions = f"run{plan.number}", 0, set[int]()
        wrong: list[str] = []
        for how, share, rank in plan.kills:
            fault = ""
            if how != "clock":
                nth = 1 + int(share * self.operations[how])
                fault = f"{OPERATIONS[how]} {nth} 1 5 kill"
            disk = {"DISK_ROOT": str(self.place / name), "DISK_FAULT": fault}
            life = self.start(name, (disk, {}))
            sessions |= set(life.pids)
            if how == "clock" and not life.wait(share * self.seconds):
                life.kill([rank] if rank >= 0 and self.ranks > 1 else ())
            life.finish()
            killed = -9 in life.codes.values()
            delivered += killed
            wrong += ["hangs"] * life.hung
            if not killed and set(life.codes.values()) != {0}:
                wrong.append(f"exit codes {sorted(life.codes.values())} without a kill")
            if not killed:
                break
        life = self.start(name).finish()
        sessions |= set(life.pids)
        wrong += ["hangs"] * life.hung
        if set(life.codes.values()) != {0}:
            last = life.text.strip().splitlines()[-1:]
            wrong.append(f"ends with codes {sorted(life.codes.values())}: {last}")
        return delivered, wrong, sessions


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if any run was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, help="number of one run to repeat")
    parser.add_argument("--keep", action="store_true", help="keep what failed")
    options = parser.parse_args(arguments)
    place = runs.begin(sys.argv)
    from tests.campaigns.verdict import Table, differences, traced

    campaign = Campaign(place, options.ranks)
    before, delivered = runs.shared_memory(), 0
    table = Table("kill", f"kill.py --ranks {options.ranks} --seed {options.seed}")
    for plan in plans(options.seed, options.kills, options.ranks):
        if options.only not in (-1, plan.number):
            continue
        kills, wrong, sessions = campaign.live(plan)
        delivered += kills
        folder = place / f"run{plan.number}"
        text = (place / f"run{plan.number}.txt").read_text(errors="replace")
        wrong += traced(text) + differences(folder, campaign.whole)
        if alive := runs.left_processes(sessions):
            wrong.append(f"left processes: {alive}")
        if memory := runs.settled(before):
            wrong.append(f"left in shared memory: {sorted(memory)}")
        if files := campaign.cache() ^ campaign.cached:
            wrong.append(f"left in the cache: {sorted(files)}")
        again = f"--kills {options.kills} --only {plan.number}"
        table.add(", ".join(how for how, _, _ in plan.kills), wrong, again=again)
        if wrong and options.keep:
            print(text[-6000:])
        runs.forget(folder)
    print(f"{delivered} kills were delivered on {options.ranks} rank(s)")
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
