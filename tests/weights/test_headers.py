"""What a file of weights says of itself beside its tensors: read with care, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.config import ConfigError, DataConfig
from fastmoco.weights.read import Weights, interpret

State = dict[str, Tensor]


def interpreted(content: dict[str, Any]) -> Weights:
    return interpret(content, Path("weights.pth"))


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        interpreted(content)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("epoch", ["best", "", [3], {"done": 3}, float("nan"), float("inf")])
def test_an_epoch_that_is_no_number_is_a_sentence(trunk: State, epoch: Any) -> None:
    told = refused({"state_dict": trunk, "epoch": epoch})
    assert told.startswith(
        f"weights.pth says that it is of the epoch {epoch!r}, which is no number"
    )
    assert interpreted({"state_dict": trunk, "epoch": "12"}).epoch == 12


PIXELS = {"channels": 3, "intensity": "auto", "alpha_over": [255, 255, 255], "exif": "ignore"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[1]", "'list' object"),
        ('"text"', "'str' object"),
        (json.dumps({"channels": "three"}), "data.channels"),
        (json.dumps({"channels": 1}), "data.channels is 1, its weights are for 3"),
        (json.dumps({"mean": 0.5}), "data.mean"),
        (json.dumps({"mean": [0.5]}), "data.mean has 1 numbers"),
        (json.dumps({"std": [0.5, 0.5, 0]}), "data.std is [0.5, 0.5, 0.0]"),
        (json.dumps({"intensity": [9, 3]}), "data.intensity is [9.0, 3.0]"),
        (json.dumps({"alpha_over": [0, 0, 300]}), "data.alpha_over"),
        (json.dumps({"exif": "never"}), "data.exif"),
        (json.dumps({"exif": None}), "null"),
        (json.dumps({"mean": [0.5, 0.5, float("nan")]}), "data.mean is [0.5, 0.5, nan]"),
    ],
)
def test_a_broken_header_of_pixels_is_a_sentence(trunk: State, text: str, part: str) -> None:
    told = refused({"state_dict": trunk, "metadata": {"pixels": text}})
    assert told.startswith("weights.pth has a header pixels that cannot be used (")
    assert part in told
    good = {"state_dict": trunk, "metadata": {"pixels": json.dumps({**PIXELS, "exif": "apply"})}}
    assert interpreted(good).pixels == DataConfig(exif="apply")


@pytest.mark.parametrize("text", ["a: [", "moco: 3", "data: {channels: 1}", "- x", 5])
def test_a_broken_configuration_is_a_sentence(trunk: State, text: Any) -> None:
    told = refused({"state_dict": trunk, "fastmoco": {"config": text}})
    assert told.startswith("weights.pth has a configuration that cannot be used (")


def test_what_other_programs_keep_under_our_names_is_theirs(trunk: State) -> None:
    others = {"metadata": ["a", 3], "fastmoco": "0.1", "state_dict": trunk}
    found = interpreted(others).trunk
    assert found.keys() == trunk.keys()
    assert all(torch.equal(found[name], trunk[name]) for name in trunk)
    assert interpreted({**others, "metadata": {"pixels": 3, "epoch": [1]}}).epoch is None
