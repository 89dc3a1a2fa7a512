#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img64-s edm2-img64-s-1073741-0.075.pkl img64.zip "$@"
