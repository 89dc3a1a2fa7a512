#!/usr/bin/env bash
# Make the training data that the train-*.sh scripts look for, in DATA_DIR (../data/edm2), as EDM2 does.
#   bash quick_start/data_prep.sh img64 ILSVRC2012/train       ImageNet at 64x64: img64.zip
#   bash quick_start/data_prep.sh img512 ILSVRC2012/train      ImageNet at 512x512 and its latents: img512.zip, img512-sd.zip
#   bash quick_start/data_prep.sh ffhq256 ffhq/images1024x1024  FFHQ at 256x256: ffhq256.zip
# Archives that are there are kept. Further options are those of the conversion to pixels: dataset_tool.py convert --help.
# Everything is checked before that starts, the autoencoder too. Variables, with their defaults:
#   VAE (stabilityai/sd-vae-ft-mse, from the Hub, or a folder)  RESOLUTION (the data set's own)  BATCH (16, images per pass)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
if [ $# -lt 2 ]; then
    echo "usage: bash quick_start/data_prep.sh img64|img512|ffhq256 SOURCE [OPTION ...]" >&2
    exit 2
fi
name="$1" source="$2"
shift 2
case "$name" in
    img64) resolution=64 transform=center-crop-dhariwal ;;
    img512) resolution=512 transform=center-crop-dhariwal ;;
    ffhq256) resolution=256 transform=none ;;
    *) refuse "there is no data set '$name': use img64, img512 or ffhq256" ;;
esac
[ -e "$source" ] || refuse "no images $source: name the folder or ZIP of the original images"
folder="${DATA_DIR:-$ROOT/../data/edm2}"
[ ! -f "$folder" ] || refuse "DATA_DIR=$folder is a file: name a folder"
batch="${BATCH:-16}"
[[ "$batch" =~ ^[1-9][0-9]{0,2}$ ]] || refuse "BATCH is '$batch': give a whole number from 1 to 999"
use_environment run

# is_there ZIP: whether the archive is there already; refuses what only has its name
is_there() {
    [ -e "$1" ] || return 1
    "$PYTHON" -c 'import sys, zipfile; sys.exit(not zipfile.is_zipfile(sys.argv[1]))' "$1" ||
        refuse "$1 is no ZIP archive, or one cut short: remove it, and it is made again"
    echo "$1 is there"
}

# check_call VAE ARGUMENT ...: refuses arguments that `dataset_tool.py convert` does not take and, unless VAE is empty, an
# autoencoder that cannot be loaded or does not take pictures of that size
check_call() {
    PYTHONPATH="$ROOT" "$PYTHON" - "$@" <<'PY'
import sys

from dataset_tool import convert, make_encoder
from torch_utils.errors import user_errors


def check(resolution, **_):
    if sys.argv[1]:
        with user_errors("BATCH"):
            import torch

            make_encoder(sys.argv[1], 1, "auto").encode_pixels(torch.zeros(1, 3, *resolution[::-1], dtype=torch.uint8))


convert.callback = check
convert.main(sys.argv[2:], prog_name="dataset_tool.py convert")
PY
}

pixels="$folder/$name.zip" latents="$folder/$name-sd.zip" vae="" todo=""
options=(--source "$source" --dest "$pixels" --resolution "${RESOLUTION:-$resolution}")
[ "$transform" = none ] || options+=(--transform "$transform")
options+=("$@")
is_there "$pixels" || todo=convert
if [ "$name" = img512 ] && ! is_there "$latents"; then
    vae="${VAE:-stabilityai/sd-vae-ft-mse}"
fi
check_call "$vae" "${options[@]}"
mkdir -p "$folder" 2>/dev/null || refuse "the folder $folder cannot be made: name another one in DATA_DIR"
if [ "$todo" = convert ]; then
    "$PYTHON" "$ROOT/dataset_tool.py" convert "${options[@]}"
elif [ $# -gt 0 ]; then
    echo "options of its conversion, without effect on what is there: $*"
fi
if [ -n "$vae" ]; then
    "$PYTHON" "$ROOT/dataset_tool.py" encode --source "$pixels" --dest "$latents" --vae "$vae" --batch "$batch"
fi
