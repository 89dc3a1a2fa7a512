#!/usr/bin/env bash
# FID of a network for FFHQ 256x256, from 50,000 images in as many steps as TS has below 39.
#   bash quick_start/eval-ffhq256.sh NUM_GPUS TS [NET] [OPTION ...]
#   REF=ffhq256.npz bash quick_start/eval-ffhq256.sh 8 0,14,39
# NUM_GPUS 0 is the CPU. NET: a file, a URL or hf://owner/repo/file; without it the variable NET, else the newest snapshot
# under training-runs/. Further options go to calculate_metrics.py gen. Variables, with their defaults:
#   REF (must be given; make it with: python calculate_metrics.py ref --data ffhq256.zip --dest ffhq256.npz)
#   SEED (123456789)  NUM (50000)  METRICS (fid)  BATCH (64, per GPU)  OUT (out/eval-ffhq256-TS.json)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
evaluate ffhq256 "" fid "$@"
