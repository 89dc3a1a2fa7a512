#!/usr/bin/env bash
# What the scripts beside it call: launch.py, which tells more with --help, by any Python that is recent enough.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$BASE" "$ROOT/quick_start/launch.py" "$@"
