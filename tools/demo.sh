#!/usr/bin/env bash
# The whole story: a kernel with hotplugged vCPUs, then a disk image that boots without firmware and with EDK2.
# While the first part is told, the second's image and firmware are built (once; then they are in .cache).
set -euo pipefail
cd "$(dirname "$0")/.."

LOG=${CHV_CACHE:-$PWD/.cache}/logs/images.log
mkdir -p "$(dirname "$LOG")"
MAKE=${MAKE:-make}

say() { printf '\ndemo: %s\n' "$*"; }

say "part 1: a stock kernel with 4 vCPUs gets 4 more, and keeps them over a reboot"
setsid "$MAKE" --no-print-directory images >"$LOG" 2>&1 &
images=$!
trap 'kill -- "-$images" 2>/dev/null || true' EXIT
"$MAKE" --no-print-directory demo-hotplug

if kill -0 "$images" 2>/dev/null; then
    say "for part 2 a disk image and firmware are being built, once, in about 5 minutes ($LOG)"
fi
if ! wait "$images"; then
    tail -n 40 "$LOG"
    exit 1
fi
trap - EXIT

say "part 2: a disk image boots, is reached over the network and resized: without firmware, and with EDK2"
# Both guests have the same address: at the same time only in two testbeds.
jobs=2
if grep -qwE 'vmx|svm' /proc/cpuinfo; then jobs=1; fi
"$MAKE" --no-print-directory -j"$jobs" demo-image demo-firmware
