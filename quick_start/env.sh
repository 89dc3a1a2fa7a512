# Sourced by the scripts beside it: $ROOT, $BASE (any Python that is recent enough) and, after `use_environment run` (or
# `use_environment dev`, with the test tools), $PYTHON, which has what the project needs: see environment.py.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

trap 'exit 130' INT # Ctrl-C ends a script once what it runs has ended, whatever exit code that chose

fail() {
    echo "error: $*" >&2
    exit 1
}

for BASE in python python3 python3.13 python3.12 python3.11 python3.10 ""; do
    if "$BASE" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then break; fi
done
[ -n "$BASE" ] || fail "Python 3.10 or newer is needed (found: $(python3 --version 2>&1 | head -n 1)); install it and run this again"
BASE="$(command -v "$BASE")"

use_environment() { # what it says goes to the terminal, the path it writes to descriptor 3 into PYTHON
    { PYTHON="$(cd "$ROOT" && exec "$BASE" -m quick_start.environment "$1" 3>&1 >&4)"; } 4>&1 || exit
}
