"""A run directory has one owner, from before anything is computed until the end of the run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastmoco.config import Config, ConfigError, RunConfig
from fastmoco.machine.owner import Owner, read_mark
from fastmoco.run.directory import check_run_directory, claimed


def test_a_folder_in_which_another_run_trains_is_refused(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    check_run_directory(config)
    with Owner(tmp_path):
        with pytest.raises(ConfigError, match=f"belongs to process {os.getpid()} "):
            check_run_directory(config)
        with pytest.raises(ConfigError, match="belongs to process"), claimed(config, True):
            pass
    check_run_directory(config)


def test_a_run_owns_its_folder_while_it_trains(tmp_path: Path) -> None:
    with claimed(Config(run=RunConfig(dir=str(tmp_path))), True):
        mark = read_mark(tmp_path)
        assert mark is not None
        assert mark.process == os.getpid()
    assert read_mark(tmp_path) is None
