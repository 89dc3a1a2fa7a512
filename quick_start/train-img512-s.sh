#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img512-s edm2-img512-s-2147483-0.130.pkl img512-sd.zip "$@"
