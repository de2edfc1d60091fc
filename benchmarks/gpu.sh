#!/usr/bin/env bash
# Check and time on one GPU what there is, in one call, most valuable rows first. Needs torch with CUDA, PyYAML and pytest.
#   bash benchmarks/gpu.sh          rows go to benchmarks/results/; MEDFAST_COMMIT names the commit where there is no git
# There are no GPU kernels yet: the operators run as plain PyTorch, and these rows are what the kernels will be held to.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:.:${PYTHONPATH:-}"
failed=0
run() { echo "== $*"; timeout 240 "$@" || { failed=1; echo "FAILED: $*"; }; }

run python benchmarks/gpu_check.py
for batch in 1 4 8; do
    run python benchmarks/step.py configs/smart.yaml --device cuda --precision bf16 --batch "$batch"
done
run python benchmarks/step.py configs/smit.yaml --device cuda --precision bf16 --batch 4
run python benchmarks/step.py configs/smart.yaml --device cuda --precision fp32 --batch 1
exit "$failed"
