"""fastmoco where Python has no POSIX modules and no fork: Windows, in part macOS.

There is no such machine here, so a `sitecustomize` takes away what they lack, in the process that
is tested and in every Python process that it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = """
import os
import sys

for name in ("fcntl", "grp", "nvidia", "pwd", "pynvml", "resource", "termios", "triton"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for name in ("fork", "geteuid", "getuid", "killpg", "sched_getaffinity", "sysconf"):
    delattr(os, name)

def symlink(*_, **__):
    raise OSError(1314, "A required privilege is not held by the client")

os.symlink = symlink
import multiprocessing

multiprocessing.set_start_method("spawn", force=True)
"""
IMPORT_ALL = """
import importlib, pkgutil, sys
import fastmoco, fastmoco_kernels

names = [
    module.name
    for package in (fastmoco, fastmoco_kernels)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
]
for name in names:
    importlib.import_module(name)
assert not {"fcntl", "resource", "triton"} & {n for n, m in sys.modules.items() if m}
print(*names)
"""


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]),
        "FASTMOCO_CACHE": str(tmp_path / "cache"),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=tmp_path, text=True, capture_output=True
    )


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    files = [*(ROOT / "fastmoco").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.")
        for path in files
        if path.stem not in ("__init__", "__main__")
    }
    assert names <= imported


PRETEND = """
import runpy, sys
import torch, torchvision, torch._dynamo, torch.utils.data, torch.utils.tensorboard
import matplotlib.figure, matplotlib.backends.backend_agg, jsonargparse, tqdm, PIL.Image
import concurrent.futures.process
import multiprocessing.popen_spawn_posix, multiprocessing.resource_sharer

sys.platform = sys.argv.pop(1)
runpy.run_module("fastmoco", run_name="__main__")
"""
TINY = [
    *("--augment.image_size", "32", "--model.arch", "resnet18", "--model.dim", "8"),
    *("--moco.queue_size", "40", "--optim.global_batch_size", "4", "--moco.bn_group_size", "2"),
    *("--run.device", "cpu", "--optim.epochs", "2", "--run.dir", "run"),
]


@pytest.mark.slow
def test_trains_stops_and_resumes(tmp_path: Path) -> None:
    """With worker processes that are spawned, kNN, and a text that names the newest checkpoint."""
    for split, count in (("train", 8), ("test", 4)):
        for number in range(count):
            place = tmp_path / "data" / split / str(number % 2) / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (20 * number, 255 * (number % 2), 90)).save(place)
    arguments = [*TINY, "--data.root", "data", "--data.workers", "1"]
    arguments += ["--knn.every", "1", "--knn.resize", "32", "--knn.k", "2"]
    for stop in ("3", "0"):
        done = run(tmp_path, "-c", PRETEND, "darwin", "train", *arguments, "--run.max_steps", stop)
        assert done.returncode == 0, done.stderr
    assert "resumed   after step 3" in done.stdout
    pointer = tmp_path / "run" / "latest.pth.tar"
    assert not pointer.is_symlink()
    assert pointer.read_text() == "checkpoint_0002_step00000004.pth.tar"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trained = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert trained[-1]["step"] == 4
    assert "peak_memory_gib" not in trained[-1]  # unknown there, so not recorded


def test_trains_on_windows(tmp_path: Path) -> None:
    """On noise: spawning for another platform than the real one is beyond Python."""
    noise = ["--data.source", "synthetic", "--data.synthetic_samples", "8"]
    done = run(tmp_path, "-c", PRETEND, "win32", "train", *TINY, *noise)
    assert done.returncode == 0, done.stderr
    start = next(line for line in done.stdout.splitlines() if line.startswith("layers"))
    assert "batch norm by ATen (on Windows none is compiled)" in start
    assert "default malloc" in done.stdout


def test_doctor_and_kernels_make_do_with_less(tmp_path: Path) -> None:
    code = """
import torch
from fastmoco.doctor import findings
from fastmoco.machine.ranks import World

world = World(0, 0, 1, torch.device("cpu"), "none")
print(dict([*findings.versions(), *findings.devices(world)])["cpu"])
from fastmoco_kernels import launch
print(sorted(launch.replaced()) == sorted(launch.OPS))
"""
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "GiB" not in done.stdout
    assert "cores for this rank" in done.stdout
    assert done.stdout.endswith("True\n")  # without triton every op is its reference on CUDA
