"""Power losses at random moments, then the same command: is the run what it would be?

    python tests/campaigns/power.py --moments 50 [--seed 0] [--only N]

The operations of a run on its files are recorded and done again up to a random one. Of what was
not flushed to the disk by then, nothing is left, or the names without the data, or any part. Every
second run is recorded again after that, and loses power a second time.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.campaigns import runs
from tests.campaigns.replay import Disk, Operation, operations

if TYPE_CHECKING:
    from tests.campaigns.campaign import Campaign

HOW = ("nothing", "names", "some")


def complete(done: list[Operation]) -> int:
    """Steps of the newest checkpoint whose name was flushed; 0 for none."""
    newest = waiting = 0
    for operation in done:
        if match := re.search(r"_step(\d+)\.pth\.tar$", operation.other):
            folder, waiting = Path(operation.other).parent, int(match[1])
        elif waiting and operation.what == "fsync" and Path(operation.one) == folder:
            newest = max(newest, waiting)
    return newest


def lose(campaign: Campaign, number: int, seed: int) -> tuple[str, list[str]]:
    """How one run loses power, and what is wrong about its end."""
    name, draw = f"run{number}", random.Random(f"{seed} {number}")
    folder, how = campaign.place / name, HOW[number % len(HOW)]
    wrong, sessions, newest = list[str](), set[int](), 0
    for source in ("whole", name)[: 1 + number // len(HOW) % 2]:
        disk, log = Disk(folder), campaign.place / f"{source}.operations"
        if source == name:
            sessions |= set(campaign.recorded(name)[0].pids)
        data = log.with_name(f"{log.name}.data").read_bytes()
        done = operations(log, campaign.place / source, folder)
        done = done[: draw.randrange(len(done))]
        for operation in done:
            disk.apply(operation, data)
        disk.lose_power(how, draw)
        newest = max(newest, complete(done))
    ends, last = campaign.last_life(name)
    text = (campaign.place / f"{name}.txt").read_text(errors="replace")
    begun = [int(step) for step in re.findall(r"resumed +after step (\d+)", text)]
    if newest > (begun or [0])[-1]:
        wrong.append(f"goes on from step {(begun or [0])[-1]} where {newest} were complete")
    return how, wrong + ends + campaign.verdict(name, sessions | last)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if any run was not as it should be."""
    parser = runs.parser(__doc__, "--moments", 50)
    options = parser.parse_args(arguments)
    place = runs.begin(sys.argv)
    from tests.campaigns.campaign import Campaign
    from tests.campaigns.verdict import Table

    campaign = Campaign(place)
    table = Table("power", f"power.py --seed {options.seed}")
    for number in range(options.moments) if options.only < 0 else [options.only]:
        how, wrong = lose(campaign, number, options.seed)
        table.add(f"of what was not flushed: {how}", wrong, again=f"--only {number}")
        if wrong and options.keep:
            runs.show(place / f"run{number}.txt")
        campaign.forget(f"run{number}")
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
