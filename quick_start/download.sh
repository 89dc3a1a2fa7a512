#!/usr/bin/env bash
# Fetch teachers that edm2.txt lists: NAME [NAME ...], or --help for more.
exec bash "$(dirname "$0")/launch.sh" download "$@"
