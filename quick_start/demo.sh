#!/usr/bin/env bash
# Distil the embedded teacher on this machine's CPU, draw images with it before and after, measure, solve two inverse
# problems with it, write a page.
# About ten minutes on two cores, plus the installation where no suitable environment is active.
#   bash quick_start/demo.sh                     results in out/demo
#   OUT=out/short DURATION=6400 NUM=500 bash quick_start/demo.sh    a shorter run
# Ctrl-C ends it; in training the state is saved first, and the same command goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source quick_start/env.sh
use_environment run

OUT="${OUT:-out/demo}"
NUM="${NUM:-2000}" # images behind each number of the table
TEACHER=assets/demo/teacher.safetensors
DATA=assets/fashion16.zip
DTYPE=float32
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then DTYPE=bf16; fi # elsewhere bf16 is emulated, slowly

run() {
    printf '\n+ python %s\n' "$(printf '%q ' "${@:2}")"
    "$@"
}
start=$SECONDS

run "$PYTHON" train_ncvsd.py --preset fashion16 --net "$TEACHER" --data "$DATA" --outdir "$OUT/run" --dtype "$DTYPE" \
    --seed 0 --device cpu ${DURATION:+--duration "$DURATION"}
[[ "$(tail -n 1 "$OUT/run/log.txt")" == *" finished at "* ]] ||
    fail "training was stopped early: the same command goes on, and draws and measures when it has finished"
BEFORE="$OUT/run/network-snapshot-000000000-0.050.safetensors"
AFTER="$(ls "$OUT"/run/network-snapshot-*-0.050.safetensors | tail -n 1)"

draw() { # NAME NET [OPTION ...]
    run "$PYTHON" generate.py --net "$2" "${@:3}" --seeds 0-63 --batch 64 --device cpu --grid --outdir "$OUT/$1"
}
draw teacher "$TEACHER"
for stage in before after; do
    net="$BEFORE"
    if [ "$stage" = after ]; then net="$AFTER"; fi
    draw "$stage-1" "$net" --ts 12,39
    draw "$stage-2" "$net" --ts 10,22,39
    draw "$stage-4" "$net" --ts 0,10,20,30,39
done

measure() {
    run "$PYTHON" calculate_metrics.py "$@" --metrics fd_demo --ref "$OUT/reference.npz" --num "$NUM" --batch 100 \
        --seed 0 --device cpu
}
run "$PYTHON" calculate_metrics.py ref --data "$DATA" --dest "$OUT/reference.npz" --metrics fd_demo --device cpu
measure calc --images "$DATA" --out "$OUT/data.json"
measure gen --net "$BEFORE" --ts 12,39 --ts 10,22,39 --ts 0,10,20,30,39 --out "$OUT/before.json"
measure gen --net "$AFTER" --ts 12,39 --ts 10,22,39 --ts 0,10,20,30,39 --out "$OUT/after.json"
measure gen --net "$TEACHER" --out "$OUT/teacher.json"

for task in super_resolution box_inpainting; do
    run "$PYTHON" posterior_sample.py --net "$AFTER" --task "demo/$task" --data assets/fashion16-test.zip --class data --num 12 \
        --batch 96 --dtype "$DTYPE" --lpips off --device cpu --outdir "$OUT/$task"
done

run "$PYTHON" quick_start/demo_report.py --before "$OUT/before.json" --after "$OUT/after.json" \
    --teacher "$OUT/teacher.json" --real "$OUT/data.json" --data "$DATA" --solved "$OUT/super_resolution" --solved "$OUT/box_inpainting" --outdir "$OUT"
printf '\n%s\n' "Done in $((SECONDS - start)) s. Pictures, table and a page that shows them: $OUT/index.html"
