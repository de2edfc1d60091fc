#!/usr/bin/env bash
# Build, check and time on one GPU whatever there is, in one call of under ten minutes, the most valuable rows first.
#   MEDFAST_COMMIT=abc1234 MEDFAST_RESULTS=$OUT MEDFAST_CACHE=$OUT bash benchmarks/gpu.sh
# The commit where there is no git folder; folders for the rows and for the verdict of `qualify` where not the usual ones.
# Needs torch with CUDA, Triton, nvcc with a C++ compiler (else there are no rows of backend cuda), and PyYAML for the
# last rows (else they are left out). No MONAI. A row is in its file as soon as it exists; a step that is red, or that
# time has run out for, is named at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:benchmarks:.:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 MEDFAST_CUDA=1
LIMIT=${LIMIT:-570}   # seconds of it all
failed=()

run() {   # run SECONDS COMMAND...: at most so long, and not beyond the end
    local seconds=$1 left=$((LIMIT - SECONDS)); shift
    ((left > 5)) || { failed+=("no time: $*"); return 1; }
    echo "== ${SECONDS} s: $*"
    timeout --kill-after=5 "$((seconds < left ? seconds : left))" "$@" || { failed+=("red ($?): $*"); return 1; }
}

run 150 python csrc/build_csrc.py
# Side by side, because what takes long here is compilers on the host; what they made is cached for the rows
checks() {
    {
        printf '%s\n' "stage one" "padded" "masked" "clipped" "cosine" "dropout" "window 7" "window 12 x 12" |
            sed 's/.*/python benchmarks\/gpu_check_window.py --cases "&"/'
        echo python benchmarks/gpu_check_operators.py
    } | xargs -d '\n' -P 9 -I{} bash -c '{}'
}
export -f checks
run 200 bash -c checks || echo "RED: each row below is checked again for itself; none is written of what is wrong"
window() { run "$1" python benchmarks/window_attention_gpu.py "${@:2}"; }
window 60 --shapes "stage 1" --contenders triton cuda "sdpa + mask"
run 60 python benchmarks/operators_gpu.py token_contrast attention_mask --dtypes bfloat16
window 60 --shapes "stage 2" "stage 3" "stage 4" --contenders triton cuda "sdpa + mask"
run 60 python benchmarks/operators_gpu.py drop_tokens restore_tokens class_attention --dtypes bfloat16
window 60 --shapes "stage 1, window 7" --contenders triton "sdpa + mask"
run 90 python -m medfast_kernels qualify
window 60 --shapes "stage 1" "stage 1, window 7" --contenders "monai compiled" flex
window 40 --dtype float16 --shapes "stage 1" --contenders triton cuda "sdpa + mask"
window 40 --dtype float32 --shapes "stage 1" --contenders triton "sdpa + mask"
window 60 --shapes "stage 2, window 7" "stage 3, window 7" "stage 4, window 7" --contenders triton "sdpa + mask"
run 60 python benchmarks/operators_gpu.py --dtypes float32
if python -c 'import yaml' 2>/dev/null; then
    run 60 python benchmarks/gpu_check.py --quick
    run 40 python benchmarks/step.py configs/smart.yaml --device cuda --precision bf16 --batch 4
    run 40 python benchmarks/step.py configs/smit.yaml --device cuda --precision bf16 --batch 4
    run 120 python benchmarks/breakdown.py configs/smart.yaml --device cuda --precision bf16 --batch 8
    run 300 python benchmarks/objectives.py --device cuda --size 128 --precision bf16
    if python -c 'import nibabel' 2>/dev/null; then
        run 120 python benchmarks/crops_gpu.py
    else
        echo "no nibabel: the rows of crops are left out"
    fi
else
    echo "no PyYAML: the rows of whole steps are left out"
fi
echo "== ${SECONDS} s, done"
((${#failed[@]} == 0)) || { printf '%s\n' "${failed[@]}"; exit 1; }
