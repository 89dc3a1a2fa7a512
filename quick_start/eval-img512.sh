#!/usr/bin/env bash
exec bash "$(dirname "$0")/launch.sh" evaluate img512 fid,fd_dinov2 "$@"
