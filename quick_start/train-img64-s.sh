#!/usr/bin/env bash
# Distil the EDM2 teacher of ImageNet 64x64, size S, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img64-s edm2-img64-s-1073741-0.075.pkl img64.zip "$@"
