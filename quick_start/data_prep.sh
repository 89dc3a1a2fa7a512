#!/usr/bin/env bash
# Make the training data that the train-*.sh scripts look for: img64|img512|ffhq256 SOURCE [OPTION ...], or --help.
exec bash "$(dirname "$0")/launch.sh" prepare "$@"
