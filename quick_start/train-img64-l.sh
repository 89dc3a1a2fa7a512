#!/usr/bin/env bash
# Distil the EDM2 teacher of ImageNet 64x64, size L, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img64-l edm2-img64-l-1073741-0.040.pkl img64.zip "$@"
