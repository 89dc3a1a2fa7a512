# Sourced by the eval-*.sh scripts beside it, which then call `evaluate PRESET REF METRICS NUM_GPUS TS [NET] [OPTION ...]`
# (REF may be empty: then the user must name one). Everything is checked before the first process starts.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

REFS=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs # EDM2's published statistics

is_remote() {
    [[ "$1" =~ ^(https?|hf):// ]]
}

is_count() {
    [[ "$1" =~ ^[0-9]{1,18}$ ]]
}

# check_schedule TS: refuses what is not a list of increasing indices of the 40-point grid, one of them below 39
check_schedule() {
    local index previous=-1 rest
    [[ "$1" =~ ^[0-9]{1,2}(,[0-9]{1,2})*$ ]] || refuse "TS is '$1': write grid indices with commas between them, as in 10,22,39"
    IFS=, read -ra rest <<<"$1"
    for index in "${rest[@]}"; do
        index=$((10#$index))
        [ "$index" -gt "$previous" ] && [ "$index" -le 39 ] || refuse "TS is '$1': its indices must increase and end at 39, as in 10,22,39"
        previous=$index
    done
    [ "$((10#${rest[0]}))" -lt 39 ] || refuse "TS is '$1': one index below 39 is needed, as in 12,39"
}

# newest_snapshot FOLDER PRESET: sets SNAPSHOT to the network with the most images, of the EMA profile 0.050 where there
# are several, from the run that wrote last; runs whose path names the preset go first. Empty where there is none.
newest_snapshot() {
    local file newest="" nimg=-1 name count
    SNAPSHOT=""
    [ -d "$1" ] || return 0
    for name in "*$2*/network-snapshot-*.safetensors" "*/network-snapshot-*.safetensors"; do
        while IFS= read -r file; do
            file="$1/${file#./}"
            if [ -z "$newest" ] || [ "$file" -nt "$newest" ]; then newest="$file"; fi
        done < <(cd "$1" && find . -type f -path "./$name" | sort) # so that no folder's name is taken for a pattern
        [ -z "$newest" ] || break
    done
    [ -n "$newest" ] || return 0
    for file in "${newest%/*}"/network-snapshot-*.safetensors; do # in the order of EMA widths for the same count
        count="${file##*/network-snapshot-}"
        count="${count%%-*}"
        is_count "$count" || continue
        if [ "$((10#$count))" -gt "$nimg" ]; then nimg=$((10#$count)) SNAPSHOT="$file"; fi
    done
}

# evaluate PRESET REF METRICS NUM_GPUS TS [NET] [OPTION ...]
evaluate() {
    local preset="$1" default_ref="$2" default_metrics="$3" device=cpu
    shift 3
    [ $# -ge 2 ] || refuse "usage: bash quick_start/eval-$preset.sh NUM_GPUS TS [NET] [OPTION ...], as in: bash quick_start/eval-$preset.sh 8 12,39"
    local gpus="$1" ts="$2" net="${NET:-}"
    shift 2
    if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
        net="${1:-$net}"
        shift
    fi

    is_count "$gpus" || refuse "NUM_GPUS is '$gpus': give the number of GPUs, 0 for the CPU"
    gpus=$((10#$gpus))
    check_schedule "$ts"
    local num="${NUM:-50000}" seed="${SEED:-123456789}" batch="${BATCH:-64}" out="${OUT:-$ROOT/out/eval-$preset-$ts.json}"
    is_count "$num" && [ "$num" -ge 2 ] || refuse "NUM is '$num': give the number of images, at least 2"
    is_count "$seed" || refuse "SEED is '$seed': give the first seed, a whole number"
    is_count "$batch" && [ "$batch" -ge 1 ] || refuse "BATCH is '$batch': give the number of images per process and batch"
    [ ! -d "$out" ] || refuse "OUT=$out is a folder: name a .json file"
    [[ "$out" == *.json ]] || refuse "OUT=$out: the report is a .json file"
    if [ -z "$net" ]; then
        newest_snapshot "$ROOT/training-runs" "$preset"
        [ -n "$SNAPSHOT" ] || refuse "no snapshot under $ROOT/training-runs: name the network as the third argument or in NET"
        net="$SNAPSHOT"
    fi
    is_remote "$net" || [ -f "${net%%#sha256=*}" ] || refuse "no network $net: name a file, a URL or hf://owner/repo/file as the third argument or in NET"
    local ref="${REF:-$default_ref}"
    [ -n "$ref" ] || refuse "no reference statistics are published for $preset: make them with 'python calculate_metrics.py ref --data DATA.zip --dest $preset.npz' and name them in REF"
    [[ "$ref" =~ ^https?:// ]] || [ -f "$ref" ] || refuse "no reference statistics $ref: name a file or URL in REF, or make one with 'python calculate_metrics.py ref'"

    use_environment run
    [ "$gpus" -eq 0 ] || device=cuda
    use_processes "$gpus" "$device" "runs on the CPU"
    echo "network: $net"
    echo "report: $out"
    "${LAUNCHER[@]}" "$ROOT/calculate_metrics.py" gen --net "$net" --ref "$ref" --ts "$ts" --num-images "$num" --seed "$seed" \
        --batch "$batch" --metrics "${METRICS:-$default_metrics}" --out "$out" --device "$device" "$@"
}
