#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img512-l edm2-img512-l-1879048-0.085.pkl img512-sd.zip "$@"
