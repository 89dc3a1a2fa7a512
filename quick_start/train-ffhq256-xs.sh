#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train ffhq256-xs edm2-ffhq256-xs.pkl ffhq256.zip "$@"
