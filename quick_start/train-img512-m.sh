#!/usr/bin/env bash
# Distil the EDM2 teacher of latents of ImageNet 512x512, size M, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img512-m edm2-img512-m-2147483-0.100.pkl img512-sd.zip "$@"
