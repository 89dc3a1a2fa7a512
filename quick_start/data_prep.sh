#!/usr/bin/env bash
# Make the training data that the train-*.sh scripts look for, in DATA_DIR (../data/edm2), as EDM2 does.
#   bash quick_start/data_prep.sh img64 ILSVRC2012/train       ImageNet at 64x64: img64.zip
#   bash quick_start/data_prep.sh img512 ILSVRC2012/train      ImageNet at 512x512 and its latents: img512.zip, img512-sd.zip
#   bash quick_start/data_prep.sh ffhq256 ffhq/images1024x1024  FFHQ at 256x256: ffhq256.zip
# Files that are there are kept. Further options go to the tool that converts. Variables, with their defaults:
#   VAE (stabilityai/sd-vae-ft-mse, from the Hub, or a folder)  RESOLUTION (the data set's own)  BATCH (16, images per pass)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

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
    *) fail "there is no data set '$name': use img64, img512 or ffhq256" ;;
esac
[ -e "$source" ] || fail "no images $source: name the folder or ZIP of the original images"
use_environment run
folder="${DATA_DIR:-$ROOT/../data/edm2}"
mkdir -p "$folder"

pixels="$folder/$name.zip"
if [ -e "$pixels" ]; then
    echo "$pixels is there"
else
    options=(--resolution "${RESOLUTION:-$resolution}")
    [ "$transform" = none ] || options+=(--transform "$transform")
    "$PYTHON" "$ROOT/dataset_tool.py" convert --source "$source" --dest "$pixels" "${options[@]}" "$@"
fi
latents="$folder/$name-sd.zip"
if [ "$name" = img512 ]; then
    if [ -e "$latents" ]; then
        echo "$latents is there"
    else
        "$PYTHON" "$ROOT/dataset_tool.py" encode --source "$pixels" --dest "$latents" \
            --vae "${VAE:-stabilityai/sd-vae-ft-mse}" --batch "${BATCH:-16}"
    fi
fi
