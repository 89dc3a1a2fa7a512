#!/usr/bin/env bash
# Distil the EDM2 teacher of 256x256 FFHQ, size XS, without classes, with the published settings.
#   bash quick_start/train-ffhq256-xs.sh NUM_GPUS [OPTION ...]
#   bash quick_start/train-ffhq256-xs.sh 8
# The same command again resumes. NUM_GPUS 0 is the CPU. Further options go to train_ncvsd.py. Variables, with their defaults:
#   MODEL_ZOO (../model_zoo/edm2)  DATA_DIR (../data/edm2)  OUT (training-runs/ffhq256-xs)
#   NNODES (1)  NODE_RANK (0)  MASTER_ADDR  MASTER_PORT (29500): the same command on every node, with its NODE_RANK
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train ffhq256-xs edm2-ffhq256-xs.pkl ffhq256.zip "$@"
