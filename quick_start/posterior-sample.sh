#!/usr/bin/env bash
# Solve one inverse problem on a folder of images, and write a page that shows the results.
#   bash quick_start/posterior-sample.sh TASK_NAME [OPTION ...]
#   DEMO=1 bash quick_start/posterior-sample.sh super_resolution      on the embedded 16x16 model and images, in a minute
# TASK_NAME: gaussian_deblur_circ, motion_deblur_circ, super_resolution, phase_retrieval, box_inpainting,
# random_inpainting, high_dynamic_range or nonlinear_deblur. Further options go to posterior_sample.py.
# Variables, with their defaults:
#   NET (../model_zoo/ncvsd/ncvsd-ffhq256-xs.pkl)  DATA (../data/test/ffhq_val)  OUT (out/posterior/TASK_NAME)
#   NUM_GPUS (0: one process, on the GPU if there is one)  BATCH (25; demo 64)  NUM (100; demo 16)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

TASKS="$(cd "$ROOT/presets/task" && printf '%s, ' *.yaml | sed 's/\.yaml//g; s/, $//')"
[ $# -ge 1 ] || refuse "usage: bash quick_start/posterior-sample.sh TASK_NAME [OPTION ...], with TASK_NAME one of $TASKS"
task="$1"
shift
[[ "$task" =~ ^[A-Za-z0-9_]+$ && -f "$ROOT/presets/task/$task.yaml" ]] || refuse "there is no task '$task': use one of $TASKS"
gpus="${NUM_GPUS:-0}"
[[ "$gpus" =~ ^[0-9]{1,5}$ ]] || refuse "NUM_GPUS is '$gpus': give a number, 0 for one process"
gpus=$((10#$gpus))

if [ "${DEMO:-0}" = 1 ]; then
    net="${NET:-$ROOT/assets/demo/student.safetensors}" data="${DATA:-$ROOT/assets/fashion16-test.zip}"
    preset="demo/$task" out="${OUT:-$ROOT/out/posterior/demo-$task}" batch="${BATCH:-64}" num="${NUM:-16}"
    set -- --class data "$@"
else
    net="${NET:-$ROOT/../model_zoo/ncvsd/ncvsd-ffhq256-xs.pkl}" data="${DATA:-$ROOT/../data/test/ffhq_val}"
    preset="$task" out="${OUT:-$ROOT/out/posterior/$task}" batch="${BATCH:-25}" num="${NUM:-100}"
    demo="DEMO=1 bash quick_start/posterior-sample.sh $task runs the task on the embedded model and images"
    [[ "$net" =~ ^(https?|hf):// ]] || [ -f "${net%%#sha256=*}" ] ||
        refuse "no network $net: put the authors' ncvsd-ffhq256-xs.pkl there (their repository links it), or name a file, a URL or hf://owner/repo/file in NET; $demo"
    [ -e "$data" ] ||
        refuse "no images $data: put validation images of FFHQ at 256x256 there (100 in the published tables), or name a folder or ZIP in DATA; $demo"
fi

use_environment run
use_processes "$gpus" cuda "is one process"
[ "$gpus" -eq 0 ] || set -- --device cuda "$@"
"${LAUNCHER[@]}" "$ROOT/posterior_sample.py" --net "$net" --data "$data" --task "$preset" --outdir "$out" --batch "$batch" --num "$num" "$@"
