#!/usr/bin/env bash
# Distil the EDM2 teacher of 64x64 ImageNet, size S, with the published settings.
#   bash quick_start/train-img64-s.sh NUM_GPUS [OPTION ...]
#   bash quick_start/train-img64-s.sh 8
# The same command again resumes. NUM_GPUS 0 is the CPU. Further options go to train_ncvsd.py. Variables, with their defaults:
#   MODEL_ZOO (../model_zoo/edm2)  DATA_DIR (../data/edm2)  OUT (training-runs/img64-s)
#   NNODES (1)  NODE_RANK (0)  MASTER_ADDR  MASTER_PORT (29500): the same command on every node, with its NODE_RANK
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train img64-s edm2-img64-s-1073741-0.075.pkl img64.zip "$@"
