#!/usr/bin/env bash
# The tests, on this machine's CPU (and its GPU where there is one), in as many processes as it has cores.
# Arguments go to pytest: test.sh tests/networks -k golden; with -n 0 they run in one process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment dev
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
