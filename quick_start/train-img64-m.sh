#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img64-m edm2-img64-m-2147483-0.060.pkl img64.zip "$@"
