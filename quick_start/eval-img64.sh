#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" evaluate img64 fid,fd_dinov2 "$@"
