#!/bin/bash
# The part of systemd_boot_test.sh that runs inside the container.
set -u
exec >/out/log 2>&1
. /probe/environment

check() { if [ "$2" = "$3" ]; then echo "ok: $1: $2"; else echo "FAIL: $1: found '$2', needed '$3'"; fi; }
property() { systemctl show oddscan --value -p "$1"; }
# Waits up to $1 seconds until the command after it succeeds.
until_true() {
    local left=$(($1 * 5)); shift
    until "$@"; do [ $((left -= 1)) -gt 0 ] || return 1; sleep 0.2; done
}
yes_if() { if "$@" >/dev/null 2>&1; then echo yes; else echo no; fi; }
metric() {
    exec 3<>"/dev/tcp/${HTTP%:*}/${HTTP#*:}" && printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
    sed -n "s/^$1 //p" <&3
}

mkdir -p /etc/oddscan /run/systemd/system/oddscan.service.d
cp /probe/config.toml /etc/oddscan/
# A program of the site whose exit code says whether it got a scan and limits. It is left out if CONFIG has its own
# [preprocess] or [alignment].
if ! grep -q '^\[\(preprocess\|alignment\)' /etc/oddscan/config.toml; then
    with_hook=yes
    cat >> /etc/oddscan/config.toml <<'END'

[alignment]
mode = "never"
[preprocess]
scans = "all"
max_output_mib = 64
command = ["/bin/sh", "-c", "[ -s $0 ] && [ $(ulimit -f) = 131072 ] && exit 3", "{scan}", "{out}"]
END
fi
# /usr is that of the host and read-only, so the binary stays where it is mounted. The watchdog is shorter here, so
# that the test need not wait two minutes for it.
sed 's#^ExecStart=/usr/bin/#ExecStart=/probe/#' /probe/oddscan.service > /run/systemd/system/oddscan.service
printf '[Service]\nWatchdogSec=15\nRestartSec=1\nEnvironment=ODDSCAN_WEIGHTS=%s\n' "${WEIGHTS:-}" \
    > /run/systemd/system/oddscan.service.d/test.conf
[ -n "${WEIGHTS:-}" ] || sed -i '/ODDSCAN_WEIGHTS/d' /run/systemd/system/oddscan.service.d/test.conf
printf 'u scanner -\nm scanner oddscan\n' > /run/scanner.conf
systemd-sysusers /probe/oddscan.sysusers /run/scanner.conf
systemd-tmpfiles --create /probe/oddscan.tmpfiles
systemctl daemon-reload

systemctl start oddscan
check "start returns when the daemon is ready" "$(property ActiveState)/$(property SubState)" active/running
echo "status: $(property StatusText)"
check "there is a status text" "$(yes_if [ -n "$(property StatusText)" ])" yes
check "the daemon runs as" "$(ps -o user= -p "$(property MainPID)")" oddscan

echo broken > /run/broken.nii && chmod 644 /run/broken.nii
setpriv --reuid=scanner --regid=scanner --init-groups cp /run/broken.nii /var/lib/oddscan/incoming/sub-01_T1w.nii
check "a member of the group can put scans in" "$(yes_if test -e /var/lib/oddscan/incoming/sub-01_T1w.nii)" yes
in_quarantine() { [ -n "$(find /var/lib/oddscan/quarantine -type f -name '*.nii')" ]; }
check "the daemon moves another user's broken scan away" "$(yes_if until_true 60 in_quarantine)" yes
# The daemon starts the converter as a process that sets its own limits. The sandbox must allow that.
echo broken > /run/broken.dcm && chmod 644 /run/broken.dcm
setpriv --reuid=scanner --regid=scanner --init-groups cp /run/broken.dcm /var/lib/oddscan/incoming/
converted() { [ -n "$(find /var/lib/oddscan/quarantine/truncated -type f -name '*.dcm')" ]; }
check "a DICOM file is looked at in a process of its own" "$(yes_if until_true 120 converted)" yes
if [ "${with_hook:-}" = yes ]; then
    python3 - > /run/scan.nii <<'END'
import struct, sys
n, spacing = 20, 10.0
header = struct.pack("<i36s8h", 348, b"", 3, n, n, n, 1, 1, 1, 1) + bytes(14)
header += struct.pack("<3h8f3f", 2, 8, 0, 1, spacing, spacing, spacing, 0, 0, 0, 0, 352, 1, 0)
header += struct.pack("<hbB", 0, 0, 2) + bytes(128) + struct.pack("<2h6f", 0, 1, *[0.0] * 6)
header += struct.pack("<12f", spacing, 0, 0, 0, 0, spacing, 0, 0, 0, 0, spacing, 0) + bytes(16) + b"n+1\0"
inside = lambda i: sum((c - 9.5) ** 2 for c in (i % n, i // n % n, i // n // n)) < 49
sys.stdout.buffer.write(header + bytes(4) + bytes((100 + i % 9) if inside(i) else 0 for i in range(n ** 3)))
END
    chmod 644 /run/scan.nii
    setpriv --reuid=scanner --regid=scanner --init-groups cp /run/scan.nii /var/lib/oddscan/incoming/sub-02_T1w.nii
    preprocessed() { grep -rq 'ended with exit code 3' /var/lib/oddscan/quarantine/preprocess_failed; }
    check "the site's own program runs within its limits" "$(yes_if until_true 60 preprocessed)" yes
fi
readable() { setpriv --reuid=scanner --regid=scanner --init-groups cat "$(find /var/lib/oddscan/quarantine -type f | head -1)"; }
check "a member of the group can read quarantine" "$(yes_if readable)" yes
state() { setpriv --reuid=scanner --regid=scanner --init-groups ls /var/lib/oddscan/state; }
check "a member of the group can read the state folder" "$(yes_if state)" no

pid=$(property MainPID)
[ -z "$HTTP" ] || before=$(metric oddscan_config_last_reload_success_timestamp_seconds)
sleep 1.1
systemctl reload oddscan
running() { [ "$(property SubState)" = running ]; }
check "reload ends" "$(yes_if until_true 10 running)" yes
check "reload keeps the process" "$(property MainPID)" "$pid"
if [ -n "$HTTP" ]; then
    reloaded() { [ "$(metric oddscan_config_last_reload_success_timestamp_seconds)" != "$before" ]; }
    check "reload shows in the metrics" "$(yes_if until_true 10 reloaded)" yes
fi

sleep 20
check "the watchdog is fed" "$(property NRestarts)" 0
kill -STOP "$pid"
restarted() { [ "$(property NRestarts)" = 1 ] && running; }
check "a stuck daemon is started again" "$(yes_if until_true 60 restarted)" yes

systemctl stop oddscan
check "stop is clean" "$(property Result)/$(property ExecMainStatus)" success/0

echo 'no such key = [' > /etc/oddscan/config.toml
systemctl start oddscan
sleep 3
check "a wrong configuration is not tried again" "$(property ExecMainStatus)/$(property NRestarts)" 78/0

journalctl --no-pager -u oddscan > /out/journal
echo done
