#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: bash bench/gpu_report.sh [options of fastmoco.train]
#
# Preflight, kernel benches, throughput with power and a profile, and the ablation of one recipe on
# this machine, as one Markdown file, gpu_report.md, to paste into an issue; traces in runs/profile.
# From a clean tree the rows are also appended to bench/results. A part that fails says so and the
# next one runs. Without options: moco_v2_r50_200ep on synthetic images; give --data.root to measure
# the loader as well. Neither DALI, NVML nor rich needs to be installed.
#
#   PYTHON=python3.12   which interpreter
#   REPORT=file.md      where to write
#   REHEARSE=1          every part on the CPU, as small as it goes: a test of this script
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
report=${REPORT:-gpu_report.md}
failed=0

options=("$@")
if [ ${#options[@]} -eq 0 ]; then
  options=(--config configs/moco_v2_r50_200ep.yaml --data.source synthetic)
fi
machine=(nvidia-smi)
tests=(tests)
kernels=(--device cuda)
few=()
contestants=()
parts=()
small_batch=32
publish=()
[ -n "$(git status --porcelain -- . ':!bench/results' 2>&1)" ] || publish=(--publish)
kernels+=(${publish[@]+"${publish[@]}"})
if [ -n "${REHEARSE:-}" ]; then
  options+=(--run.device cpu --run.precision fp32 --model.arch resnet18 --model.width 0.25
    --augment.image_size 32 --optim.global_batch_size 8 --moco.bn_group_size 4 --moco.queue_size 64)
  machine=(uname -a)
  tests=(tests/bench/measure/test_launches.py)
  kernels=(--device cpu --only ema --windows 1)
  few=(--windows 1)
  contestants=(--only step,official)
  parts=(--only waterfall)
  small_batch=4
  publish=()
fi

part() { # part TITLE COMMAND...
  local title=$1 status
  shift
  echo "== $title"
  {
    printf '\n## %s\n\n`%s`\n\n```\n' "$title" "$*"
    "$@" 2>&1 | tee /dev/stderr | tail -n 120
    status=${PIPESTATUS[0]}
    printf '```\n'
    [ "$status" -eq 0 ] || printf '**exit code %s**\n' "$status"
  } >> "$report"
  [ "$status" -eq 0 ] || failed=$((failed + 1))
}

printf '# fastmoco on %s\n\n%s, commit %s\n' "$(uname -n)" "$(date -u +%FT%TZ)" \
  "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" > "$report"
part "Machine" "${machine[@]}"
part "Doctor and preflight" "$python" -m fastmoco.doctor "${options[@]}"
part "Tests on the device" "$python" -m pytest -q -m gpu "${tests[@]}"
part "Kernels" "$python" -m bench.kernels "${kernels[@]}"
part "Throughput and profile" "$python" -m bench.throughput "${options[@]}" --profile \
  ${contestants[@]+"${contestants[@]}"} ${few[@]+"${few[@]}"} ${publish[@]+"${publish[@]}"}
part "Throughput of a small batch" "$python" -m bench.throughput "${options[@]}" \
  --optim.global_batch_size "$small_batch" \
  ${contestants[@]+"${contestants[@]}"} ${few[@]+"${few[@]}"} ${publish[@]+"${publish[@]}"}
part "Ablation" "$python" -m bench.ablation "${options[@]}" \
  ${parts[@]+"${parts[@]}"} ${few[@]+"${few[@]}"} ${publish[@]+"${publish[@]}"}
printf '\n%s parts failed.\n' "$failed" >> "$report"
echo "$report written; $failed parts failed"
exit $((failed > 0))
