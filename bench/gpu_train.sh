#!/usr/bin/env bash
# On a machine with a CUDA GPU: 20 steps of img64-s with a random-weight teacher (seconds of each phase, peak memory,
# half-precision errors, memory formats, torch.compile, what writing a state costs), the same at half the batch where
# float32 needs it, how long a state of 4 GiB takes to be verified, and the tests.
#   bash bench/gpu_train.sh          tables on the terminal, JSON in bench/results/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}" STATES="${STATES:-${TMPDIR:-/tmp}}"
run=("$PYTHON" bench/bench_train.py --device cuda --preset img64-s --steps 20)
"${run[@]}" --batch-gpu 64 --state-dir "$STATES" --out bench/results/gpu_train.json
"${run[@]}" --batch-gpu 32 --variants float32,fp16,bf16 --out bench/results/gpu_train_batch32.json
"$PYTHON" bench/bench_state.py --device cuda --gib 4 --dir "$STATES" --out bench/results/gpu_state.json
"$PYTHON" -m pytest tests -q
