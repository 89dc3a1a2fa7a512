#!/usr/bin/env bash
# Distil the EDM2 teacher of ImageNet 64x64, size M, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img64-m edm2-img64-m-2147483-0.060.pkl img64.zip "$@"
