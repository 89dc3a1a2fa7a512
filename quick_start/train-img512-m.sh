#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img512-m edm2-img512-m-2147483-0.100.pkl img512-sd.zip "$@"
