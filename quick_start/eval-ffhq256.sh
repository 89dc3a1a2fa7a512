#!/usr/bin/env bash
# FID of a network for FFHQ 256x256, from 50,000 images: NUM_GPUS TS [NET] [OPTION ...], as in 8 12,39, or --help for more.
exec bash "$(dirname "$0")/launch.sh" evaluate ffhq256 fid "$@"
