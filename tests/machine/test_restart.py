"""Real runs under torchrun: two agents on one host, and a rank that is killed and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.runs.mortal_trainer import DEATH

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
CONFIG = [
    *("--data.source=synthetic", "--data.synthetic_samples=24", "--augment.image_size=16"),
    *("--model.arch=resnet18", "--model.stem=cifar", "--model.dim=16"),
    *("--moco.queue_size=64", "--moco.bn_group_size=4", "--optim.global_batch_size=8"),
    *("--optim.epochs=100", f"--run.max_steps={STEPS}", "--run.log_every=1", "--run.device=cpu"),
    *("--run.precision=fp32", "--run.timeout_s=1200", "--run.keep_checkpoints=0"),
]


def launch(folder: Path, *options: str, trainer: str = "fastmoco.train") -> subprocess.Popen[str]:
    """One torchrun agent on the CPU whose ranks train into `folder`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = ["-m", trainer, *CONFIG, f"--run.dir={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *program],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(agents: list[subprocess.Popen[str]]) -> str:
    """Output of the agents, all of which must succeed."""
    try:
        outputs = [agent.communicate()[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    for agent, output in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, output[-4000:]
    return "\n".join(outputs)


def steps_logged(folder: Path) -> list[int]:
    """Steps of the training records so far, in the order of writing."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] in ("train", "warmup")]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "latest.pth.tar", weights_only=True)
    assert content["fastmoco"]["step"] == STEPS
    state: dict[str, torch.Tensor] = content["state_dict"]
    return state


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_killed_rank_is_restarted_and_ends_where_two_nodes_end(tmp_path: Path) -> None:
    killed, nodes = tmp_path / "killed", tmp_path / "nodes"
    restarting = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    output = finish([launch(killed, *restarting, trainer="tests.support.runs.mortal_trainer")])
    # It goes on from the last checkpoint, at the end of an epoch of 3; every step has one record.
    assert f"resumed   after step {(DEATH - 1) // 3 * 3}" in output
    assert steps_logged(killed) == list(range(1, STEPS + 1))
    assert "step" in next(line for line in output.splitlines() if "another rank died" in line)

    common = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    common.append(f"--master_port={free_port()}")
    finish([launch(nodes, *common, f"--node_rank={node}") for node in range(2)])
    assert steps_logged(nodes) == list(range(1, STEPS + 1))
    one, other = final_state(killed), final_state(nodes)
    assert all(torch.equal(one[name], other[name]) for name in one)
