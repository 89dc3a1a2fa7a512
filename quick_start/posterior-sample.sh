#!/usr/bin/env bash
# Solve one inverse problem on a folder of images, and write a page of the results: TASK_NAME [OPTION ...], or --help.
exec bash "$(dirname "$0")/launch.sh" posterior "$@"
