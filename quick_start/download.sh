#!/usr/bin/env bash
# Fetch a teacher listed in edm2.txt into MODEL_ZOO (../model_zoo/edm2). Interrupted downloads are continued, and a file
# that is there is compared with what the list, an earlier download or the server says of length and hash.
#   bash quick_start/download.sh NAME [NAME ...]
#   bash quick_start/download.sh edm2-img512-m-2147483-0.100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

list="${EDM2_LIST:-$ROOT/quick_start/edm2.txt}"
names="$(awk '!/^#/ && NF == 4 {print $1}' "$list" | tr '\n' ' ')"
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "NAME is one of $names"
    exit
fi
if [ $# -eq 0 ]; then
    echo "usage: bash quick_start/download.sh NAME [NAME ...], of: $names" >&2
    exit 2
fi
for name in "$@"; do
    [[ " $names " == *" $name "* ]] || refuse "edm2.txt does not list '$name': use one of $names"
done
zoo="${MODEL_ZOO:-$ROOT/../model_zoo/edm2}"
[ ! -f "$zoo" ] || refuse "MODEL_ZOO=$zoo is a file: name a folder"
use_environment run
echo "licence: CC BY-NC-SA 4.0 (its authors'; not for commercial use), https://creativecommons.org/licenses/by-nc-sa/4.0/"
for name in "$@"; do
    awk -v name="$name" '!/^#/ && $1 == name {print $2, $3, $4}' "$list" | {
        read -r url bytes sha256
        "$PYTHON" "$ROOT/quick_start/fetch.py" --url "$url" --dest "$zoo/$name.pkl" --bytes "$bytes" --sha256 "$sha256"
    }
done
