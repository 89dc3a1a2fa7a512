# Sourced by the train-*.sh scripts beside it, which then call `train PRESET TEACHER DATA NUM_GPUS [OPTION ...]`, with the
# file names of teacher and data. Everything is checked before the first process starts.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# require_count NAME VALUE LEAST
require_count() {
    [[ "$2" =~ ^[0-9]{1,5}$ ]] && [ "$((10#$2))" -ge "$3" ] && [ "$((10#$2))" -le 65535 ] ||
        refuse "$1 is '$2': give a whole number, at least $3"
}

# signal_children PARENT: SIGUSR1 to its children every second, until it has ended
signal_children() {
    trap '' TERM USR1 HUP INT
    while kill -0 "$1" 2>/dev/null; do
        if command -v pkill >/dev/null; then
            pkill -USR1 -P "$1" || true
        else # minimal containers have no procps
            cat /proc/"$1"/task/*/children 2>/dev/null | xargs kill -USR1 2>/dev/null || true
        fi
        sleep 1
    done
}

# request_stop, a signal handler within `supervise`: hand the request on, or note it where nothing runs yet
request_stop() {
    requested=yes
    if [ -n "$child" ] && [ -z "$messenger" ]; then
        signal_children "$child" &
        messenger=$!
    fi
    if [ "$interrupts" -eq 2 ]; then
        kill -TERM "$child" 2>/dev/null || true
    fi
}

# supervise COMMAND ...: run it, and hand requests to stop on to the processes that train: they finish their step, save
# and end with code 0; after Ctrl-C this one ends with 130. torchrun itself, sent a signal, would end them with an error,
# after 30 seconds by force. A request is repeated, since those processes may not have started yet, and SIGUSR1 is ignored
# until they handle it.
supervise() {
    local child="" messenger="" requested="" code=0 interrupts=0
    trap request_stop TERM USR1 HUP
    trap 'interrupts=$((interrupts + 1)); request_stop' INT
    (
        trap '' USR1
        # a session of its own: Ctrl-C reaches this shell alone
        exec "$PYTHON" -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@"
    ) &
    child=$!
    [ -z "$requested" ] || request_stop
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # a signal ends the wait early
    done
    trap '' TERM USR1 HUP INT
    wait "$child" || code=$?
    [ -z "$messenger" ] || wait "$messenger" || true
    [ "$interrupts" -eq 0 ] || code=130 # also where the processes were told by another signal
    return "$code"
}

# train PRESET TEACHER DATA NUM_GPUS [OPTION ...]
train() {
    local preset="$1" teacher data
    local zoo="${MODEL_ZOO:-$ROOT/../model_zoo/edm2}" folder="${DATA_DIR:-$ROOT/../data/edm2}"
    teacher="$zoo/$2" data="$folder/$3"
    shift 3
    [ $# -ge 1 ] && [[ "$1" != -* ]] || refuse "usage: bash quick_start/train-$preset.sh NUM_GPUS [OPTION ...], as in: bash quick_start/train-$preset.sh 8"
    local gpus="$1" device="${DEVICE:-cuda}" out="${OUT:-$ROOT/training-runs/$preset}"
    local nodes="${NNODES:-1}" node="${NODE_RANK:-0}" port="${MASTER_PORT:-29500}" address="${MASTER_ADDR:-}"
    shift
    require_count NUM_GPUS "$gpus" 0
    require_count NNODES "$nodes" 1
    require_count NODE_RANK "$node" 0
    require_count MASTER_PORT "$port" 1
    gpus=$((10#$gpus))
    [ "$node" -lt "$nodes" ] || refuse "NODE_RANK is $node: with NNODES=$nodes the nodes are 0 to $((nodes - 1))"
    [ "$nodes" -eq 1 ] || [ -n "$address" ] || refuse "NNODES is $nodes: name the host of node 0 in MASTER_ADDR"
    [ "$nodes" -eq 1 ] || [ "$gpus" -gt 0 ] || refuse "NUM_GPUS is 0: several nodes need at least 1 process each"
    [ -f "$teacher" ] || refuse "no teacher $teacher: fetch it with 'bash quick_start/download.sh $(basename "$teacher" .pkl)', or name its folder in MODEL_ZOO"
    [ -f "$data" ] || refuse "no data $data: make it with 'bash quick_start/data_prep.sh', or name its folder in DATA_DIR"
    [ ! -f "$out" ] || refuse "OUT=$out is a file: name a folder"

    use_environment run
    [ "$gpus" -gt 0 ] || device=cpu
    if [ "$nodes" -eq 1 ]; then
        use_processes "$gpus" "$device" "runs on the CPU"
    else
        use_processes "$gpus" "$device" "runs on the CPU" \
            --nnodes "$nodes" --node-rank "$node" --master-addr "$address" --master-port "$port"
    fi
    echo "teacher: $teacher"
    echo "run folder: $out"
    set -- "${LAUNCHER[@]}" "$ROOT/train_ncvsd.py" --preset "$preset" --net "$teacher" --data "$data" --outdir "$out" \
        --device "$device" "$@"
    if [ "$gpus" -eq 0 ]; then
        exec "$@"
    fi
    supervise "$@"
}
