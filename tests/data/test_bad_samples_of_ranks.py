"""What one rank finds bad, all ranks and the log of the run learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config, ConfigError, OneRankError, parse
from fastmoco.data.bad_samples import BadSamples
from fastmoco.data.sources.choose import open_source
from fastmoco.machine.ranks import World
from tests.support.ranks import Ranks

SAMPLES = 10


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Ten images of which number 3 and number 7 are cut short."""
    (tmp_path / "images").mkdir()
    for number in range(SAMPLES):
        file = tmp_path / "images" / f"{number}.png"
        noise = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(file)
        if number in (3, 7):
            file.write_bytes(file.read_bytes()[:1000])
    return parse(
        [
            *("--data.source", "folder", "--data.root", str(tmp_path / "images")),
            *("--run.dir", str(tmp_path / "run"), "--data.max_bad_share", "0.2"),
        ]
    )


def exchanged(world: World, config: Config, found: list[list[int]]) -> tuple[str, str, int]:
    """What is said after an exchange of `found`, by rank, and after another; how many are known."""
    bad = BadSamples(config, open_source(config), world.rank)
    bad.record(np.array([[number, 0] for number in found[world.rank]]))
    try:
        first = bad.exchange(world)
    except ConfigError as error:
        return str(error), "", len(bad.reasons)
    bad.record(np.array([[number, 0] for number in (3, 7)]))  # known by now, whoever found it
    return first, bad.exchange(world), len(bad.reasons)


def test_names_found_on_another_rank_reach_the_log_of_rank_0(
    two_ranks: Ranks, config: Config
) -> None:
    said = two_ranks.run(exchanged, config, [[7], [3]])
    assert said[0] == said[1]
    first, second, known = said[0]
    assert first.startswith("2 bad samples so far")
    assert "3.png (" in first
    assert "7.png (" in first
    assert (second, known) == ("", 2)
    lines = Path(config.run.dir, "bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == [3, 7]


def test_the_share_that_ends_a_run_is_of_what_all_ranks_found(
    two_ranks: Ranks, config: Config
) -> None:
    """Two of ten are allowed: no rank finds more, both together do, and both end."""
    said = two_ranks.run(exchanged, config, [[1, 2], [3]])
    assert [known for *_, known in said] == [3, 3]
    assert all("3 of 10 samples are bad" in first for first, *_ in said)


def test_more_than_the_share_on_one_rank_is_a_sentence_of_that_rank(config: Config) -> None:
    bad = BadSamples(config, open_source(config), 1)
    with pytest.raises(OneRankError, match=r"^3 of 10 samples are bad, more than data\.max_bad_"):
        bad.record(np.array([[number, 0] for number in (3, 5, 7)]))


def test_synthetic_images_have_nothing_to_tell(config: Config) -> None:
    assert BadSamples(config, None, 0).exchange(World(0, 0, 1, torch.device("cpu"), "none")) == ""
