#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" evaluate ffhq256 fid "$@"
