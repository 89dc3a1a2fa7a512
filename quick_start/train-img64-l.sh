#!/usr/bin/env bash
# Distil the EDM2 teacher of 64x64 ImageNet, size L, with the published settings.
#   bash quick_start/train-img64-l.sh NUM_GPUS [OPTION ...]
#   bash quick_start/train-img64-l.sh 8
# The same command again resumes. NUM_GPUS 0 is the CPU. Further options go to train_ncvsd.py. Variables, with their defaults:
#   MODEL_ZOO (../model_zoo/edm2)  DATA_DIR (../data/edm2)  OUT (training-runs/img64-l)
#   NNODES (1)  NODE_RANK (0)  MASTER_ADDR  MASTER_PORT (29500): the same command on every node, with its NODE_RANK
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train img64-l edm2-img64-l-1073741-0.040.pkl img64.zip "$@"
