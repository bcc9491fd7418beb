"""What waits for a GPU, in four stages of at most nine minutes each.

    python3 -m bench.on_gpu prepare                 where there is a network: wheels into carried/
    python3 -m bench.on_gpu STAGE --out FOLDER      on the GPU, from the root of this project

Stages, each of which can be run again by itself:

    kernels     doctor and preflight, the ops raced, tests on the device
    compiled    the compiled step at 256 and at 32 images, where a host synchronization is an error;
                what keeps its host
    throughput  our step against the published step and against the bare encoder, one pair at a time
    loaders     array, nvJPEG and DALI (where it is installed), alone and feeding the step

FOLDER keeps the output of every part, the rows (`*.jsonl`) and the compiled code of Inductor and
Triton, so that stages after the first compile less. How each part ended comes last. Needs nothing
but Python and torch: neither `.git` (then name the commit in BENCH_COMMIT) nor what `prepare` has
brought.
Options after these are those of `fastmoco.train`; loaders takes --data.root, a folder of JPEGs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# The standard library only: what the stages import may still lie in a wheel.
ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "carried"
WHEELS = ("jsonargparse", "docstring-parser", "typeshed-client", "threadpoolctl")
RECIPE = ("--config", str(ROOT / "configs" / "moco_v2_r50_200ep.yaml"))
LIMIT_S = 540.0
PLAIN = "addopts=--import-mode=importlib"
# A rehearsal on the CPU; the names of the parts and what they run stay the same.
TOY = [
    *("--run.device=cpu", "--run.precision=fp32", "--run.compile=off", "--model.arch=resnet18"),
    *("--model.width=0.25", "--augment.image_size=32", "--optim.global_batch_size=4"),
    *("--moco.bn_group_size=2", "--moco.queue_size=64", "--data.workers=1"),
]
Parts = dict[str, list[str]]
# Of 15 minutes on a GPU five went to parts that each found out by themselves.
MAY_PUBLISH = """
import sys, torch
from bench.measure.rows import origin
from fastmoco.config import ConfigError
try:
    origin(torch.device("cpu"), True)
except ConfigError as error:
    sys.exit(f"bench.on_gpu: {error}")
"""


def prepare() -> int:
    """Download the pure Python wheels that a bare image with torch lacks: about 1 MB."""
    command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(CARRIED)]
    return subprocess.run([sys.executable, "-m", *command, *WHEELS]).returncode


def parts_of(stage: str, options: Sequence[str], toy: bool, out: Path) -> Parts:
    """Arguments of Python for each part of a stage, by its name; profiles go into `out`."""
    step = [*RECIPE, "--data.source=synthetic", *(TOY if toy else []), *options]
    windows = ["--publish", *(["--windows", "1"] if toy else [])]
    throughput = ["-m", "bench.throughput", *step, *windows]
    fed = [*RECIPE, *(TOY if toy else []), *options]
    feeding = ["-m", "bench.throughput", *fed, *windows, "--only", "loader,end_to_end"]
    device = "cpu" if toy else "cuda"
    brief = ["--device", device, *windows, *(["--only", "ema"] if toy else [])]
    small = f"--optim.global_batch_size={4 if toy else 32}"
    tests = ["tests/kernels/test_gpu.py"] if toy else ["tests"]
    stages: dict[str, Parts] = {
        "kernels": {
            "doctor": ["-m", "fastmoco.doctor", *step],
            "ops": ["-m", "bench.kernels", *brief],
            # Without the project's own options, which ask for plugins that an image may lack.
            "tests": ["-m", "pytest", "-q", "-m", "gpu", "-o", PLAIN, *tests],
        },
        "compiled": {
            f"step of {batch}": [
                *(*throughput, "--only", "silent,captured,cudnn_benchmark"),
                f"--optim.global_batch_size={batch}",
            ]
            for batch in ((4, 2) if toy else (256, 32))
        }
        | {"host": ["-m", "bench.profiling", *step, small, f"--out={out / 'profile'}"]},
        "throughput": {
            "published step": [*throughput, "--only", "step,official"],
            "bare encoder": [*throughput, "--only", "step,encoder"],
        },
        "loaders": {
            "array": [*feeding, "--data.backend=array"],
            "nvjpeg": [*feeding, "--data.backend=nvjpeg"],
            "dali": [*feeding, "--data.backend=dali"],
        },
    }
    return stages[stage]


def environment(out: Path) -> dict[str, str]:
    """Variables of the parts: where modules, rows and compiled code are."""
    carried = out / "carried"
    for wheel in CARRIED.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(carried)
    # Last, so that what is installed comes before what was carried here.
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""), str(carried)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "BENCH_RESULTS": str(out),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(out / "cache" / "triton"),
    }


def run_part(
    name: str, arguments: Sequence[str], out: Path, left_s: float, variables: Mapping[str, str]
) -> str:
    """Run one part, its output into a file and onto the screen; returns how it ended."""
    if left_s <= 0:
        return "not begun: the stage is out of time"
    print(f"== {name}", flush=True)
    log = out / f"{name.replace(' ', '_')}.log"
    command = [sys.executable, *arguments]
    with log.open("w") as file:
        print("python", *arguments, file=file, flush=True)
        # A session of its own: out of time, a part ends with all its contestants.
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(left_s)
            ended = f"exit code {code}" if code else "done"
        except subprocess.TimeoutExpired:
            ended = "ended: the stage is out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    print("\n".join(log.read_text().splitlines()[-40:]), flush=True)
    return ended


def may_publish(variables: Mapping[str, str]) -> bool:
    """Whether rows of this tree may be kept; else the sentence why not is printed."""
    command = [sys.executable, "-c", MAY_PUBLISH]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode == 0


def run_stage(stage: str, out: Path, limit_s: float, parts: Parts) -> int:
    """Run the parts one after the other, a failed one too; print how each ended; exit code."""
    out.mkdir(parents=True, exist_ok=True)
    ends_at, variables, ends = time.time() + limit_s, environment(out), {}
    for name, arguments in parts.items():
        start = time.time()
        ended = run_part(name, arguments, out, ends_at - start, variables)
        ends[name] = f"{ended} | {time.time() - start:.0f} s"
    print(f"\n{stage}: rows and outputs in {out}\n\n| part | how it ended | |\n|---|---|---|")
    print("\n".join(f"| {name} | {ended} |" for name, ended in ends.items()), flush=True)
    return int(any(not ended.startswith("done") for ended in ends.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a part failed or had no time left; 2 where nothing could be begun."""
    parser = argparse.ArgumentParser(
        "bench.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("prepare", "kernels", "compiled", "throughput", "loaders")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "on_gpu")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--toy", action="store_true", help="a rehearsal on the CPU")
    own, options = parser.parse_known_args(arguments)
    if own.stage == "prepare":
        return prepare()
    if own.stage == "loaders" and not any(o.startswith("--data.root") for o in options):
        print("bench.on_gpu: loaders needs images: --data.root FOLDER.", file=sys.stderr)
        return 2
    out = own.out.resolve()
    if not may_publish(environment(out)):
        return 2
    return run_stage(own.stage, out, own.limit_s, parts_of(own.stage, options, own.toy, out))


if __name__ == "__main__":
    sys.exit(main())
