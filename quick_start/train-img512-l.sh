#!/usr/bin/env bash
# Distil the EDM2 teacher of latents of ImageNet 512x512, size L, with the published settings: NUM_GPUS [OPTION ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" train img512-l edm2-img512-l-1879048-0.085.pkl img512-sd.zip "$@"
