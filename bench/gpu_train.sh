#!/usr/bin/env bash
# On a machine with a CUDA GPU: the tests, half-precision errors, 20 steps of img64-s with a random teacher, and how long a
# training state holds them up.
#   bash bench/gpu_train.sh          table on the terminal, JSON in bench/results/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
"$PYTHON" -m pytest tests -q
"$PYTHON" bench/bench_train.py --device cuda --preset img64-s --batch-gpu 64 --steps 20 --out bench/results/gpu_train.json
"$PYTHON" bench/bench_state.py --device cuda --gib 4
