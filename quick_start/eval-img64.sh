#!/usr/bin/env bash
# FID and FD-DINOv2 of a network for ImageNet 64x64, from 50,000 images: NUM_GPUS TS [NET] [OPTION ...], as in 8 12,39, or --help for more.
exec bash "$(dirname "$0")/launch.sh" evaluate img64 fid,fd_dinov2 "$@"
