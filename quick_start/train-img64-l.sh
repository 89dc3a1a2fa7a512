#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" train img64-l edm2-img64-l-1073741-0.040.pkl img64.zip "$@"
