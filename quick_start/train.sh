# Sourced by the train-*.sh scripts beside it, which then call `train PRESET TEACHER DATA NUM_GPUS [OPTION ...]`, with the
# file names of teacher and data. Everything is checked before the first process starts.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# require_count NAME VALUE LEAST
require_count() {
    [[ "$2" =~ ^[0-9]{1,5}$ ]] && [ "$((10#$2))" -ge "$3" ] || refuse "$1 is '$2': give a whole number, at least $3"
}

# supervise COMMAND ...: run it, and hand requests to stop on to the processes that train: they finish their step, save
# and end with code 0. torchrun itself, sent a signal, would end them with an error, after 30 seconds by force.
supervise() {
    local child code=0 interrupts=0
    setsid "$@" & # a session of its own: Ctrl-C reaches this shell alone
    child=$!
    trap 'pkill -USR1 -P "$child" || true' TERM USR1 HUP
    trap 'interrupts=$((interrupts + 1)); if [ "$interrupts" -gt 1 ]; then kill -TERM "$child"; else pkill -USR1 -P "$child" || true; fi' INT
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # else a signal ended the wait
    done
    trap - TERM USR1 HUP INT
    return "$code"
}

# train PRESET TEACHER DATA NUM_GPUS [OPTION ...]
train() {
    local preset="$1" teacher data found launcher
    local zoo="${MODEL_ZOO:-$ROOT/../model_zoo/edm2}" folder="${DATA_DIR:-$ROOT/../data/edm2}"
    teacher="$zoo/$2" data="$folder/$3"
    shift 3
    [ $# -ge 1 ] || refuse "usage: bash quick_start/train-$preset.sh NUM_GPUS [OPTION ...], as in: bash quick_start/train-$preset.sh 8"
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
    if [ "$gpus" -eq 0 ]; then
        launcher=("$PYTHON")
        device=cpu
    else
        if [ "$device" = cuda ]; then
            found="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
            [ "$gpus" -le "$found" ] || refuse "NUM_GPUS is $gpus, and PyTorch sees $found CUDA device(s): give at most that many (0 runs on the CPU)"
        fi
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
        launcher=("$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus")
        if [ "$nodes" -eq 1 ]; then
            launcher+=(--standalone)
        else
            launcher+=(--nnodes "$nodes" --node-rank "$node" --master-addr "$address" --master-port "$port")
        fi
        launcher+=(--) # after the dashes torchrun takes no option for an abbreviation of its own
    fi
    echo "teacher: $teacher"
    echo "run folder: $out"
    set -- "${launcher[@]}" "$ROOT/train_ncvsd.py" --preset "$preset" --net "$teacher" --data "$data" --outdir "$out" \
        --device "$device" "$@"
    if [ "$gpus" -eq 0 ]; then
        exec "$@"
    fi
    supervise "$@"
}
