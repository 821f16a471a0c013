#!/bin/bash
# Boots a real systemd in a container and runs the shipped unit in it. Tests ready, status, a scan and a DICOM file that
# another user brings, reload, watchdog, stop, and wrong settings, after which systemd does not try again.
#
#   sudo scripts/systemd_boot_test.sh BINARY CONFIG [WEIGHTS]
#
# CONFIG names the folders of systemd/oddscan.tmpfiles. The daemon gets WEIGHTS as ODDSCAN_WEIGHTS. With
# ODDSCAN_HTTP=HOST:PORT in the environment, the test also reads the metrics page. It needs root and Debian's package
# systemd-container. The container runs from memory, and nothing outside of it changes.
set -euo pipefail

fail() { echo "$*" >&2; exit 1; }
[ $# -ge 2 ] || fail "usage: $0 BINARY CONFIG [WEIGHTS]"
[ "$(id -u)" = 0 ] || fail "found user $(id -un), needed root: run it with sudo"
command -v systemd-nspawn >/dev/null || fail "systemd-nspawn is missing: apt-get install systemd-container"

repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/probe" "$work/out"
cp "$repository"/systemd/oddscan.{service,sysusers,tmpfiles} "$repository/scripts/systemd_boot_drive.sh" "$work/probe"
chmod 755 "$work" "$work/probe" "$work/probe/systemd_boot_drive.sh"
install -m 755 "$1" "$work/probe/oddscan"
install -m 644 "$2" "$work/probe/config.toml"
echo "HTTP=${ODDSCAN_HTTP:-}" > "$work/probe/environment"

binds=(--bind-ro="$work/probe":/probe --bind="$work/out":/out)
if [ $# -ge 3 ]; then
    binds+=(--bind-ro="$(realpath "$3")":/weights/"$(basename "$3")")
    echo "WEIGHTS=/weights/$(basename "$3")" >> "$work/probe/environment"
fi

timeout --kill-after=10 240 systemd-nspawn --quiet --register=no --keep-unit --volatile=yes \
    "${binds[@]}" -D / --boot --capability=all systemd.firstboot=off \
    systemd.mask=systemd-firstboot.service systemd.run=/probe/systemd_boot_drive.sh \
    systemd.run_success_action=poweroff systemd.run_failure_action=poweroff \
    </dev/null >"$work/out/console" 2>&1 || true

cat "$work/out/log" 2>/dev/null || { tail -20 "$work/out/console"; fail "the container did not boot"; }
if grep -q '^FAIL' "$work/out/log" || ! grep -q '^done' "$work/out/log"; then
    cat "$work/out/journal" 2>/dev/null || true
    exit 1
fi
