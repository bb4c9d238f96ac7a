#!/usr/bin/env bash
# The GPU evidence of one commit: bench/h100.sh OUT [part ...] [commit=SHA] [fill=prefill|random] [key=value ...]
#
#   tests                              the test suite
#   gather decode16 sweep long         single suites (`bench gather`, `bench decode`)
#   steps                              `bench targets resident misses breakdown`
#   systems                            `bench targets peers link memory`
#   longrun                            `bench targets long-run`
#   fuzz                               captured against eager steps under one random schedule
#   sanitize                           compute-sanitizer over small cases of every kernel
#
# OUT is a folder such as bench/results/2026-11-22-h100; every part writes into a folder of its own below it. Without
# a part all of them run, each under 8 minutes. key=value words change the configuration of the targets. The exit code
# is 1 when any part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

all=(tests gather decode16 sweep long steps systems longrun fuzz sanitize)
out=${1:?usage: bench/h100.sh OUT [part ...] [commit=SHA] [fill=prefill|random] [key=value ...]}
shift
parts=() commit=() fill=random overrides=()
for word in "$@"; do
    case $word in
        commit=*) commit=(--commit "${word#commit=}") ;;
        fill=*) fill=${word#fill=} ;;
        *.*=*) overrides+=("$word") ;;
        tests | gather | decode16 | sweep | long | steps | systems | longrun | fuzz | sanitize) parts+=("$word") ;;
        *) echo "unknown part: $word" >&2; exit 2 ;;
    esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${all[@]}")

limit=470
model=configs/models/llama-3.1-8b.json
mkdir -p "$out"

bench() {
    timeout "$limit" python3 -m bench "$@" ${commit[@]+"${commit[@]}"}
}

run_tests() {
    # Half the time goes into compiling kernels, so that several processes help where pytest-xdist is there.
    local workers=()
    python3 -c "import xdist" 2> /dev/null && workers=(-n 12)
    timeout "$limit" python3 -m pytest -v ${workers[@]+"${workers[@]}"} --durations=15 -m "gpu or not gpu" > "$out/pytest.txt" 2>&1
    local status=$?
    tail -n 40 "$out/pytest.txt"
    return $status
}

run_gather() {
    bench gather --out "$out/gather"
}

# Ours against stock and the captured dense peer in turns on the same weights, then Hugging Face's offloading, whose
# steps take seconds.
run_decode16() {
    bench decode --model "$model" --batch-sizes 16 --contexts 16384 --fill "$fill" --out "$out/decode16" \
        --baselines stock,dense-graph,no-attention-graph,rheo-eager \
        cache.device_memory=floor selection.token_budget=4096 || return 1
    bench decode --model "$model" --batch-sizes 16 --contexts 16384 --fill "$fill" --out "$out/decode16-hf-offloaded" \
        --baselines hf-offloaded --steps 4 --warmup 1 cache.device_memory=floor selection.token_budget=4096
}

run_sweep() {
    bench decode --model "$model" --batch-sizes 1,4,8,16 --contexts 16384 --fill random --out "$out/sweep" \
        --baselines dense-graph,no-attention-graph --forced-miss-rates 0,0.05,0.2 \
        cache.device_memory=floor selection.token_budget=4096
}

# Peak memory counts here, so the prompt is really read and nothing but ours runs.
run_long() {
    bench decode --model "$model" --batch-sizes 1 --contexts 16384,32768,131072 --fill prefill --out "$out/long" \
        --baselines no-attention-graph cache.device_memory=floor selection.token_budget=4096
}

targets() {
    local name=$1
    shift
    bench targets "$@" ${overrides[@]+"${overrides[@]}"} --model "$model" --out "$out/$name"
}

run_steps() {
    targets steps resident misses breakdown
}

# `memory` comes last: it fills all of the host store.
run_systems() {
    targets systems peers link memory
}

run_longrun() {
    targets longrun long-run
}

run_fuzz() {
    bench fuzz --out "$out/fuzz"
}

run_sanitize() {
    timeout "$limit" python3 -m bench.sanitize "$out/sanitizer"
}

failed=0
for part in "${parts[@]}"; do
    echo "== $part"
    start=$SECONDS
    "run_$part" || { echo "== $part FAILED"; failed=1; }
    echo "== $part took $((SECONDS - start)) s"
done
exit $failed
