"""Runs that stop and go on, on two ranks and with every mechanism, end in the same bits."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import ConfigError, parse
from fastmoco.config.fields import Mechanism
from fastmoco.machine.ranks import World
from fastmoco.train import Run
from tests.support.ranks import Ranks
from tests.support.runs.final_state import assert_same_bits, final_state
from tests.support.tiny import ONE

SMALL = [
    *("--augment.image_size=32", "--model.arch=resnet18", "--model.width=0.25", "--model.dim=8"),
    *("--moco.queue_size=15", "--moco.bn_group_size=4", "--optim.global_batch_size=8"),
    *("--optim.epochs=3", "--optim.name=sgd", "--run.device=cpu", "--run.precision=fp32"),
    *("--data.source=folder", "--data.workers=1", "--data.max_bad_share=0.1"),
]


def pictures(folder: Path, count: int = 24) -> Path:
    """Noise; the second file is cut short, so that another sample stands for it."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.jpg")
    broken = folder / "01.jpg"
    broken.write_bytes(broken.read_bytes()[:-500])
    return folder


def train(world: World, arguments: list[str]) -> None:
    # Processes of the pool are daemons, which may have no children; `Run` ends its readers itself.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    Run(parse(arguments), world).train()


def options(mechanism: Mechanism, root: Path, run: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"--moco.mechanism={mechanism}",
        f"--data.root={root}",
        f"--run.dir={run}",
        *more,
    ]


@pytest.mark.processor
@pytest.mark.parametrize("mechanism", ["end_to_end", "memory_bank"])
def test_two_ranks_go_on_from_any_step(
    two_ranks: Ranks, tmp_path: Path, mechanism: Mechanism
) -> None:
    """Each rank goes on with its own BN statistics, and saving changes none of them."""
    root, whole, parts = pictures(tmp_path / "images"), tmp_path / "whole", tmp_path / "parts"
    two_ranks.run(train, options(mechanism, root, whole))
    for stop in ("2", "6", "0"):
        two_ranks.run(train, options(mechanism, root, parts, f"--run.max_steps={stop}"))
    assert_same_bits(final_state(whole), final_state(parts))
    assert ("module.bank" in final_state(whole)) == (mechanism == "memory_bank")


@pytest.mark.processor
@pytest.mark.parametrize("mechanism", ["end_to_end", "memory_bank"])
def test_one_rank_goes_on_from_any_step(tmp_path: Path, mechanism: Mechanism) -> None:
    root, whole, parts = pictures(tmp_path / "images"), tmp_path / "whole", tmp_path / "parts"
    train(ONE, options(mechanism, root, whole))
    for stop in ("4", "0"):
        train(ONE, options(mechanism, root, parts, f"--run.max_steps={stop}"))
    assert_same_bits(final_state(whole), final_state(parts))


def test_a_killed_bank_run_goes_on_from_its_last_checkpoint(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """What happened after the checkpoint leaves no trace: the last steps are done twice."""
    root, whole, killed = pictures(tmp_path / "images"), tmp_path / "whole", tmp_path / "killed"
    two_ranks.run(train, options("memory_bank", root, whole))
    two_ranks.run(train, options("memory_bank", root, killed, "--run.max_steps=5"))
    last = killed / "checkpoint_0001_step00000005.pth.tar"
    last.unlink()  # as if the run had died in step 6, before this one was written
    (killed / "latest.pth.tar").unlink()
    (killed / "latest.pth.tar").symlink_to("checkpoint_0001_step00000003.pth.tar")
    two_ranks.run(train, options("memory_bank", root, killed))
    assert_same_bits(final_state(whole), final_state(killed))


def test_changed_records_are_told(tmp_path: Path) -> None:
    root, folder = pictures(tmp_path / "images"), tmp_path / "run"
    more = ("--run.log_every=1", "--run.max_steps=4")
    train(ONE, options("queue", root, folder, *more))
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()

    def told() -> bool:
        config = parse(options("queue", root, folder, "--run.max_steps=6"))
        return any("does not hold what it held" in line for line in Run(config, ONE).warnings)

    assert not told()
    metrics.write_text(text + '{"kind": "train", "step": 5}\n')  # after the checkpoint
    assert not told()
    for changed in (text.replace('"loss": ', '"loss": 1'), text[: len(text) // 2], ""):
        metrics.write_text(changed)
        assert told()
    metrics.unlink()
    assert told()


def test_a_changed_data_set_is_refused_with_what_changed(tmp_path: Path) -> None:
    root, run = pictures(tmp_path / "images"), tmp_path / "run"
    train(ONE, options("memory_bank", root, run, "--run.max_steps=1"))
    (root / "07.jpg").rename(root / "x.jpg")
    with pytest.raises(ConfigError, match=r"1 added: .*x\.jpg; 1 gone\. .*resume_changes allow"):
        Run(parse(options("memory_bank", root, run)), ONE)
    allowed = Run(parse(options("memory_bank", root, run, "--run.resume_changes=allow")), ONE)
    assert any("x.jpg; 1 gone (24 images then, 24 now)" in text for text in allowed.warnings)
    allowed.loader.close()


def own_copy(world: World, folder: Path, arguments: list[str]) -> str:
    try:
        Run(parse([*arguments, f"--data.root={folder / f'copy{world.rank}'}"]), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_unequal_copies_of_the_data_say_so(two_ranks: Ranks, tmp_path: Path) -> None:
    pictures(tmp_path / "copy0")
    pictures(tmp_path / "copy1", count=25)
    (tmp_path / "copy1" / "03.jpg").unlink()
    arguments = [*SMALL, "--optim.name=sgd_ema", f"--run.dir={tmp_path / 'run'}"]
    texts = two_ranks.run(own_copy, tmp_path, arguments)
    assert texts[0] == texts[1]
    assert "compared with rank 0, rank 1 has 1 added: " in texts[0]
    assert texts[0].endswith("24.jpg; 1 gone. Give every node the same copy.")


def test_a_rank_without_data_ends_all_of_them(two_ranks: Ranks, tmp_path: Path) -> None:
    pictures(tmp_path / "copy0")
    arguments = [*SMALL, "--optim.name=sgd_ema", f"--run.dir={tmp_path / 'run'}"]
    texts = two_ranks.run(own_copy, tmp_path, arguments)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Rank 1: data.root")
