#!/usr/bin/env bash
# FID and FD-DINOv2 of a network for ImageNet 512x512, from 50,000 images in as many steps as TS has below 39.
#   bash quick_start/eval-img512.sh NUM_GPUS TS [NET] [OPTION ...]
#   bash quick_start/eval-img512.sh 8 12,39
# NUM_GPUS 0 is the CPU. NET: a file, a URL or hf://owner/repo/file; without it the variable NET, else the newest snapshot
# under training-runs/. Further options go to calculate_metrics.py gen. Variables, with their defaults:
#   REF (EDM2's img512.pkl, downloaded)
#   SEED (123456789)  NUM (50000)  METRICS (fid,fd_dinov2)  BATCH (64, per GPU)  OUT (out/eval-img512-TS.json)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
evaluate img512 "$REFS/img512.pkl" fid,fd_dinov2 "$@"
