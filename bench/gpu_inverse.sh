#!/usr/bin/env bash
# On a machine with a CUDA GPU: seconds per image of every inverse problem with the ffhq256-xs architecture, random weights.
#   bash bench/gpu_inverse.sh        table on the terminal, JSON in bench/results/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python3}" bench/bench_posterior.py --device cuda --preset ffhq256-xs --batch 25 --steps 50 --out bench/results/gpu_inverse.json
