"""SIGKILL at random moments, then the same command, until it ends: is the run what it would be?

    python tests/campaigns/kill.py --kills 50 [--ranks 2] [--seed 0] [--only N]

Of the kills, one half comes by the clock and the other at a random operation on a file of the run
or of the cache: before it opens, writes, flushes or renames something.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaigns import runs

if TYPE_CHECKING:
    from tests.campaigns.campaign import Campaign


@dataclass
class Plan:
    """One run and how it is disturbed; a function of the seed and its number."""

    number: int
    kills: list[tuple[str, float, int]] = field(default_factory=list)
    """Of each: `clock` or an operation, the share of the run before it, and the rank."""


def plans(seed: int, ranks: int) -> Iterator[Plan]:
    """Runs without end, each with one to three kills."""
    for number in count():
        draw = random.Random(f"{seed} {number}")
        plan = Plan(number)
        for _ in range(draw.choice((1, 1, 2, 3))):
            how = draw.choice(["clock"] * 4 + list(runs.OPERATIONS))
            plan.kills.append((how, draw.random(), draw.randrange(-1, ranks) if ranks > 1 else 0))
        yield plan


def live(campaign: Campaign, plan: Plan, seconds: float) -> tuple[int, list[str]]:
    """Kills delivered, and what is wrong about the run that ends after them."""
    name, delivered, sessions = f"run{plan.number}", 0, set[int]()
    wrong: list[str] = []
    for how, share, rank in plan.kills:
        fault = ""
        if how != "clock":
            nth = 1 + int(share * campaign.operations[how])
            fault = f"{runs.OPERATIONS[how]} {nth} 1 5 kill"
        life = campaign.start(name, {"DISK_FAULT": fault})
        sessions |= set(life.pids)
        if how == "clock" and not life.wait(share * seconds):
            life.kill([rank] if rank >= 0 and campaign.ranks > 1 else ())
        life.finish()
        killed = -9 in life.codes.values()
        delivered += killed
        wrong += ["hangs"] * life.hung
        if not killed and set(life.codes.values()) != {0}:
            wrong.append(f"exit codes {sorted(life.codes.values())} without a kill")
        if not killed:
            break
    ends, last = campaign.last_life(name)
    return delivered, wrong + ends + campaign.verdict(name, sessions | last)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if any run was not as it should be."""
    parser = runs.parser(__doc__, "--kills", 50)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args(arguments)
    place = runs.begin(sys.argv)
    from tests.campaigns.campaign import Campaign
    from tests.campaigns.verdict import Table

    campaign, delivered = Campaign(place, options.ranks), 0
    seconds = campaign.duration()
    table = Table("kill", f"kill.py --ranks {options.ranks} --seed {options.seed}")
    for plan in plans(options.seed, options.ranks):
        if delivered >= options.kills or plan.number > options.only >= 0:
            break
        if options.only not in (-1, plan.number):
            continue
        kills, wrong = live(campaign, plan, seconds)
        delivered += kills
        table.add(", ".join(how for how, _, _ in plan.kills), wrong, again=f"--only {plan.number}")
        if wrong and options.keep:
            runs.show(place / f"run{plan.number}.txt")
        campaign.forget(f"run{plan.number}")
    print(f"{delivered} kills were delivered on {options.ranks} rank(s)")
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
