#!/usr/bin/env bash
# Distil the EDM2 teacher of latents of 512x512 ImageNet, size M, with the published settings.
#   bash quick_start/train-img512-m.sh NUM_GPUS [OPTION ...]
#   bash quick_start/train-img512-m.sh 8
# The same command again resumes. NUM_GPUS 0 is the CPU. Further options go to train_ncvsd.py. Variables, with their defaults:
#   MODEL_ZOO (../model_zoo/edm2)  DATA_DIR (../data/edm2)  OUT (training-runs/img512-m)
#   NNODES (1)  NODE_RANK (0)  MASTER_ADDR  MASTER_PORT (29500): the same command on every node, with its NODE_RANK
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train img512-m edm2-img512-m-2147483-0.100.pkl img512-sd.zip "$@"
