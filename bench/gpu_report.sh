#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: bash bench/gpu_report.sh [options of fastmoco.train]
#
# Preflight, kernel benches, throughput, ablation and profile of one recipe on this machine, as one
# Markdown file, gpu_report.md, to paste into an issue. A part that fails says so and the next one
# runs. Without options: moco_v2_r50_200ep on synthetic images (give --data.root for the loader).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
options=("$@")
if [ ${#options[@]} -eq 0 ]; then
  options=(--config configs/moco_v2_r50_200ep.yaml --data.source synthetic)
fi
report=gpu_report.md
failed=0

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
part "Device" nvidia-smi
part "Doctor and preflight" "$python" -m fastmoco.doctor "${options[@]}"
part "Tests on the device" "$python" -m pytest -q -m gpu tests
part "Kernels" "$python" -m bench.kernels --device cuda --save
part "Throughput" "$python" -m bench.throughput "${options[@]}"
part "Throughput, batch 32" "$python" -m bench.throughput "${options[@]}" \
  --optim.global_batch_size 32
part "Ablation" "$python" -m bench.ablation "${options[@]}" --compile
part "Profile" "$python" -m bench.profiling "${options[@]}" --out runs/gpu_profile
echo "$report written; $failed parts failed"
exit $((failed > 0))
