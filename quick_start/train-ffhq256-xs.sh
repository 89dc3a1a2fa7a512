#!/usr/bin/env bash
# Distil the EDM2 teacher of FFHQ 256x256, size XS, without classes, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train ffhq256-xs edm2-ffhq256-xs.pkl ffhq256.zip "$@"
