#!/usr/bin/env bash
# Distil the EDM2 teacher of latents of ImageNet 512x512, size S, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img512-s edm2-img512-s-2147483-0.130.pkl img512-sd.zip "$@"
