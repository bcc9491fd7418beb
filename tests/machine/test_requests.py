"""What one rank asks for, all ranks learn after the same step."""

from __future__ import annotations

from fastmoco.machine.collectives import SharedRequest
from fastmoco.machine.ranks import World
from tests.support.ranks import Ranks

CHECKPOINT, STOP = 1, 2


def heard(world: World, asked: list[list[int]]) -> list[int]:
    """What a rank hears in every step, whose own levels are `asked[rank]`."""
    shared = SharedRequest(world)
    found = [shared.poll(level) for level in asked[world.rank]]
    shared.settle()
    return found


def test_a_checkpoint_is_asked_for_once_although_it_is_overdue_until_it_is_begun(
    two_ranks: Ranks,
) -> None:
    """It is known one step later, in which the rank that asked still does."""
    asked = [[0, CHECKPOINT, CHECKPOINT, 0, 0, 0, 0], [0] * 7]
    assert two_ranks.run(heard, asked) == [[0, 0, CHECKPOINT, 0, 0, 0, 0]] * 2
    asked = [[CHECKPOINT, CHECKPOINT, 0, 0, 0, 0, 0], [0, 0, 0, CHECKPOINT, CHECKPOINT, 0, 0]]
    assert two_ranks.run(heard, asked) == [[0, CHECKPOINT, 0, 0, CHECKPOINT, 0, 0]] * 2


def test_a_stop_lasts_and_outweighs_a_checkpoint(two_ranks: Ranks) -> None:
    asked = [[0, STOP, 0, 0, 0], [CHECKPOINT, CHECKPOINT, CHECKPOINT, 0, 0]]
    assert two_ranks.run(heard, asked) == [[0, CHECKPOINT, STOP, STOP, STOP]] * 2
