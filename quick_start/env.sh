# Sourced by the scripts beside it. After `use_environment run` (or `use_environment dev`, with the test tools), $PYTHON
# is an interpreter that has what the project needs: the active one where that is the case, else one in .venv/; after
# `use_processes`, $LAUNCHER is what starts a script in as many processes as are wanted.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

trap 'exit 130' INT # Ctrl-C ends a script once what it runs has ended, whatever exit code that chose

NEEDED_RUN="torch>=2.5 numpy>=1.26 click>=8.1 pillow>=10.1 tqdm>=4.66 safetensors>=0.4 huggingface_hub>=0.26
            diffusers>=0.31 accelerate>=0.34 tensorboard>=2.16 pyyaml>=6.0 jinja2>=3.1
            requests>=2.31 urllib3>=2.3 scipy>=1.11"
NEEDED_DEV="$NEEDED_RUN psutil>=5.9 pytest>=8.0 pytest-timeout>=2.3 pytest-xdist>=3.6 ruff>=0.9"

fail() {
    echo "error: $*" >&2
    exit 1
}

# refuse MESSAGE: for mistakes in how a script was called
refuse() {
    echo "error: $*" >&2
    exit 2
}

# python_is_recent PYTHON: whether it runs and is Python 3.10 or newer
python_is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# python_has PYTHON "PACKAGE>=VERSION ...": whether all of them are installed, without importing any
python_has() {
    "$1" - "$2" >/dev/null 2>&1 <<'PY'
import re
import sys
from importlib.metadata import version


def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)[:2]]


for needed in sys.argv[1].split():
    name, least = needed.split(">=")
    if numbers(version(name)) < numbers(least):
        sys.exit(1)
PY
}

# same_requirements MARKER FILE: whether the installation that wrote MARKER finished, and was of the same FILE
same_requirements() {
    [ -f "$1" ] && cat "$ROOT/requirements.txt" "$2" | cmp -s - "$1"
}

# use_environment run|dev: sets PYTHON
use_environment() {
    local needed="$NEEDED_RUN" requirements="$ROOT/requirements.txt" venv="$ROOT/.venv" candidate base=""
    if [ "$1" = dev ]; then
        needed="$NEEDED_DEV" requirements="$ROOT/requirements-dev.txt"
    fi
    for candidate in python python3; do
        if python_is_recent "$candidate" && python_has "$candidate" "$needed"; then
            PYTHON="$(command -v "$candidate")"
            echo "environment: $PYTHON"
            return
        fi
    done

    local marker="$venv/installed-$1.txt"
    PYTHON="$venv/bin/python"
    if python_is_recent "$PYTHON" && same_requirements "$marker" "$requirements" && python_has "$PYTHON" "$needed"; then
        echo "environment: .venv"
        return
    fi

    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if python_is_recent "$candidate"; then
            base="$candidate"
            break
        fi
    done
    [ -n "$base" ] || fail "Python 3.10 or newer is needed (found: $(python3 --version 2>&1 | head -n 1)); install it and run this again"
    if ! python_is_recent "$PYTHON" || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --clear "$venv" >/dev/null 2>&1 ||
            fail "'$base -m venv' failed: install Python's venv module (package python3-venv on Debian and Ubuntu) and run this again"
    fi
    rm -f "$marker"
    echo "environment: installing $(basename "$requirements") into .venv (once; some minutes) ..."
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check -r "$requirements" ||
        fail "pip could not install $(basename "$requirements") (see above); check the network and run this again"
    cat "$ROOT/requirements.txt" "$requirements" >"$marker.new"
    mv "$marker.new" "$marker"
}

# use_processes GPUS DEVICE ZERO [NODE_OPTION ...]: sets LAUNCHER, the words to put before a script and its options, for
# GPUS processes on DEVICE. 0 is one process without torchrun; ZERO says in a message what the caller makes of it.
# NODE_OPTION: torchrun's, where there are several nodes. After `use_environment`.
use_processes() {
    local gpus="$1" device="$2" zero="$3" found
    shift 3
    LAUNCHER=("$PYTHON")
    [ "$gpus" -gt 0 ] || return 0
    if [ "$device" = cuda ]; then
        found="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
        [ "$gpus" -le "$found" ] || refuse "NUM_GPUS is $gpus, and PyTorch sees $found CUDA device(s): give at most that many (0 $zero)"
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
    LAUNCHER+=("$ROOT/quick_start/processes.py")
    [ $# -gt 0 ] || LAUNCHER+=(--standalone)
    # after the dashes torchrun takes no option (say --num) for an abbreviation of its own (--numa-binding)
    LAUNCHER+=(--nproc-per-node "$gpus" "$@" --)
}
