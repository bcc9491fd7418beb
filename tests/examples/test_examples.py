"""The scripts of docs/clusters.md, run as far as there is a cluster: none, so with stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastmoco.config import parse
from fastmoco.machine.stopping import REQUEUE

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NARROW = [
    *("--run.device=cpu", "--run.precision=fp32", "--run.log_every=1", "--knn.every=0"),
    *("--data.source=synthetic", "--augment.image_size=32", "--model.arch=resnet18"),
    *("--model.width=0.25", "--model.dim=8", "--moco.queue_size=64", "--moco.bn_group_size=2"),
    *("--optim.global_batch_size=8", "--run.checkpoint_every=100000", "--run.timeout_s=120"),
]
SRUN = """#!{python}
import os, signal, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word == "bash"):]
ranks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda number, _: [rank.send_signal(number) for rank in ranks])
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
sys.exit(max(rank.wait() for rank in ranks))
"""
SCONTROL = """#!/bin/sh
case $1 in
hostnames | show) echo 127.0.0.1 ;;
requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job of two tasks on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    fastmoco = f'#!/bin/sh\nexec {sys.executable} -m fastmoco "$@"\n'
    (commands / "fastmoco").write_text(fastmoco)
    (commands / "fastmoco").chmod(stat.S_IRWXU)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SRUN_PID": str(tmp_path / "srun"),
        "REQUEUED": str(tmp_path / "requeued"),
    }


def submit(cluster: dict[str, str], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm.sbatch"), *arguments],
        env=cluster,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_slurm_job_is_queued_again_until_its_run_is_complete(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    log, requeued = tmp_path / "run" / "metrics.jsonl", Path(cluster["REQUEUED"])
    arguments = [*NARROW, f"--run.dir={tmp_path / 'run'}", "--optim.epochs=100"]
    job = submit(cluster, arguments)
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    os.kill(int(Path(cluster["SRUN_PID"]).read_text()), signal.SIGUSR1)
    output, _ = job.communicate()
    assert job.returncode == REQUEUE, output
    assert requeued.read_text().split() == [cluster["SLURM_JOB_ID"]]
    done = yaml.safe_load(log.read_text().splitlines()[-1])["step"]

    job = submit(cluster, [*arguments, f"--run.max_steps={done + 2}"])
    output, _ = job.communicate()
    assert job.returncode == 0, output
    steps = [yaml.safe_load(line).get("step") for line in log.read_text().splitlines()]
    assert steps[-1] == done + 2
    assert requeued.read_text().split() == [cluster["SLURM_JOB_ID"]]


def test_a_wrong_option_is_not_queued_again(cluster: dict[str, str], tmp_path: Path) -> None:
    job = submit({**cluster, "SLURM_NTASKS": "1"}, [*NARROW, "--moco.queue_size=-1"])
    output, _ = job.communicate()
    assert job.returncode == 2, output
    assert not Path(cluster["REQUEUED"]).exists()


def test_the_elastic_script_trains_on_the_ranks_that_it_is_told(tmp_path: Path) -> None:
    if shutil.which("torchrun", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("torchrun is not beside this Python")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "RUN": "test",
        "PROCESSES": "2",
        "PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    script = [str(EXAMPLES / "elastic.sh"), *NARROW, f"--run.dir={tmp_path}", "--run.max_steps=2"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout or "2 ranks" in done.stdout


def test_the_job_of_kubernetes_starts_a_run_that_exists() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    nodes = next(word for word in command if word.startswith("--nnodes="))
    assert nodes == f"--nnodes={spec['completions']}"
    assert spec["completions"] == spec["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in command
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29400" in command
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    options = command[command.index("fastmoco.train") + 1 :]
    here = [option.replace("/app/", f"{ROOT}/") for option in options]
    assert parse(here).run.dir == "/runs/r50"
