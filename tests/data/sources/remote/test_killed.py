"""A run on a bucket that is killed in the middle ends as one on local files that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.data.far_store import FarStore
from tests.support.runs.final_state import assert_same_bits, final_state

for module in ("s3fs", "moto"):
    pytest.importorskip(module, reason="the extra remote or dev is not installed")


def train(root: str, folder: Path, *, trainer: str = "fastmoco.train") -> int:
    options = [
        *(f"--data.root={root}", "--data.source=shards", f"--run.dir={folder}"),
        *("--data.backend=array", "--data.workers=1", "--run.device=cpu", "--run.precision=fp32"),
        *("--augment.image_size=16", "--model.arch=resnet18", "--model.stem=cifar"),
        *("--model.width=0.125", "--moco.queue_size=64", "--moco.bn_group_size=5"),
        *("--optim.global_batch_size=20", "--optim.epochs=4"),
    ]
    return subprocess.run([sys.executable, "-m", trainer, *options], check=False).returncode


def test_a_killed_run_goes_on_with_the_same_samples(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(photos.rglob("*.jpg"))
    (shards := tmp_path / "shards").mkdir()
    for number in range(6):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in files[10 * number : 10 * number + 10]:
                tar.add(path, path.name)
    root = Path(__file__).resolve().parents[4]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "kernels")]))
    assert train(str(shards), tmp_path / "local") == 0
    with FarStore() as store:
        monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
        bucket = store.put_folder(shards, "killed")
        killed = train(bucket, tmp_path / "far", trainer="tests.support.runs.mortal_trainer")
        assert killed == -signal.SIGKILL
        assert train(bucket, tmp_path / "far") == 0
    assert_same_bits(final_state(tmp_path / "far"), final_state(tmp_path / "local"))
