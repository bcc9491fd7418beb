#!/usr/bin/env bash
# Pre-training on as many nodes as there are; start it on each of them, in any order:
#
#     HOST=node0 NODES=2:4 RUN=r50 examples/elastic.sh --config configs/moco_v2_r50_200ep.yaml \
#         --data.root /data/imagenet --run.dir /shared/runs/r50
#
# HOST: one of the nodes, where they meet. NODES: the fewest to begin with, and the most. RUN: a name
# that the nodes of one run share. When a node is lost or comes back, the others start again from the
# newest good checkpoint; the images keep their order on any number of ranks.
set -euo pipefail

# torchrun hands these to the ranks, waits 30 s for them and ends with exit code 1; 0 is a complete
# run. What a batch system sends before the time is up is among them.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

exec torchrun \
    --nnodes "${NODES:-1:1}" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HOST:-localhost}:${PORT:-29400}" \
    --rdzv-id "${RUN:?a name for the run}" \
    -m fastmoco.train "$@"
