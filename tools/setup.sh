#!/usr/bin/env bash
# Make this machine ready: Debian packages, a virtual environment in .venv, guest kernels in .cache.
# Prints one line for each thing that it does, and the whole output of what fails.
# Done before: takes no time, changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${CHV_CACHE:-$PWD/.cache}
LOG=$CACHE/logs/setup.log
mkdir -p "$CACHE/logs"
: >"$LOG"

say() { printf 'setup: %s\n' "$*"; }

quietly() {
    local start=$SECONDS
    if ! "$@" >>"$LOG" 2>&1; then
        say "failed after $((SECONDS - start)) s: $*"
        tail -n 60 "$LOG"
        exit 1
    fi
}

# --- Debian packages ------------------------------------------------------------------

PACKAGES="qemu-system-x86 qemu-system-common acpica-tools busybox-static cpio xz-utils zstd lz4
          gcc libc6-dev make linux-libc-dev python3-dev python3-venv util-linux socat curl ca-certificates
          mmdebstrap mtools dosfstools fdisk e2fsprogs openssh-client iproute2"
# What tools/cloudhv.sh builds the firmware with.
PACKAGES="$PACKAGES build-essential nasm uuid-dev"
# Worth having, but not in every release: fwts tests ACPI tables, virtiofsd left QEMU's package in Debian 13,
# EDK2 of 2022 is built with Python's distutils.
OPTIONAL="fwts virtiofsd debian-archive-keyring python3-distutils"

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
offered() { apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'; }

if command -v dpkg-query >/dev/null; then
    missing=()
    for package in $PACKAGES; do
        installed "$package" || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ] || [ ! -e "$CACHE/packages.stamp" ]; then
        if [ "$(id -u)" = 0 ]; then
            as_root=()
        elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        elif [ ${#missing[@]} -gt 0 ]; then
            say "these Debian packages are missing and this user may not install them:"
            say "    apt-get install ${missing[*]}"
            exit 1
        else
            as_root=(false)
        fi
        if [ "${as_root[*]-}" != false ]; then
            quietly "${as_root[@]}" apt-get -qq update
            for package in $OPTIONAL; do
                if ! installed "$package" && offered "$package"; then missing+=("$package"); fi
            done
            if [ ${#missing[@]} -gt 0 ]; then
                say "Debian packages: ${missing[*]}"
                quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install \
                    --no-install-recommends -o DPkg::Lock::Timeout=300 -y "${missing[@]}"
            fi
        fi
        touch "$CACHE/packages.stamp"
    fi
else
    say "no dpkg here: take care yourself of what is like Debian's $PACKAGES"
fi

# --- the virtual environment ------------------------------------------------------------

# Not made again when another Python comes first in PATH: the stamp is about what is in it.
wanted=$(cat pyproject.toml setup.py <(echo "${PYTHON-}") | sha256sum)
if [ "$(cat .venv/setup.stamp 2>/dev/null)" != "$wanted" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    python=${PYTHON:-$(tools/pythons.sh | head -n 1)}
    if [ -z "$python" ]; then
        say "no Python 3.11 or newer found (python3, python3.NN, pyenv)"
        exit 1
    fi
    say "virtual environment .venv with $("$python" --version), and chv built into it"
    rm -rf .venv
    quietly "$python" -m venv .venv
    quietly .venv/bin/pip install --disable-pip-version-check -e '.[test,lint,bench]'
    echo "$wanted" >.venv/setup.stamp
    touch .venv/build.stamp
fi

# --- guests -----------------------------------------------------------------------------

wanted=$(cat tests/guests/*.py tests/guests/rootfs/init tests/guests/rootfs/etc/* | sha256sum)
if [ "$(cat "$CACHE/guests.stamp" 2>/dev/null)" != "$wanted" ]; then
    say "guest kernels and their initramfs in $CACHE/guests"
    quietly .venv/bin/python -m tests.guests
    grep '^no guest kernel' "$LOG" | sed 's/^/setup: /' || true
    echo "$wanted" >"$CACHE/guests.stamp"
fi

# --- fwts, where Debian's release does not have it ----------------------------------------

if ! tools/fwts.sh --fetch >>"$LOG" 2>&1; then
    say "no fwts to be had: the tests that use it are skipped"
fi
