#!/usr/bin/env bash
# Installs what the build, the tests and the demo need on Debian 12 with Rust. A second run does nothing.
set -euo pipefail
missing=()
for package in build-essential pkg-config libsystemd-dev python3 python3-pip python3-venv "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    run=()
    [ "$(id -u)" = 0 ] || run=(sudo)
    "${run[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${run[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
