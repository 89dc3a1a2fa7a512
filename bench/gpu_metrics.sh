#!/usr/bin/env bash
# On a machine with a CUDA GPU: 5,000 images end to end, random-weight img64-s student and Inception, by stage.
#   bash bench/gpu_metrics.sh        table on the terminal, JSON in bench/results/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python3}" bench/bench_metrics.py --device cuda --preset img64-s --num 5000 --out bench/results/gpu_metrics.json
