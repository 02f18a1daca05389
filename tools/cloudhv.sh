#!/usr/bin/env bash
# Build EDK2's firmware for Cloud Hypervisor (OvmfPkg/CloudHv) and print where it is.
#
#     tools/cloudhv.sh                   .cache/firmware/CLOUDHV.fd, built unless it is there
#     tools/cloudhv.sh --if-present      the same, but build nothing: exit status 1 if it is not there
#
# Debian packages EDK2's builds for QEMU, not this one. So it is built from Debian's own source package edk2, from the
# mirror that this machine's apt uses: about 7 minutes on two cores, 27 MB to download, less than 1 GB on disk while it is
# built, 4 MiB when it is done. Once for each version of the package. Nothing is installed, and no root is needed.
#
# Needs: build-essential nasm acpica-tools uuid-dev, and python3-distutils where Debian has that (12, not 13).
set -euo pipefail
cd "$(dirname "$0")/.."

HERE=${CHV_CACHE:-$PWD/.cache}/firmware
FIRMWARE=$HERE/CLOUDHV.fd
LOG=$HERE/build.log
TARGET=RELEASE

say() { printf 'cloudhv: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

step() {
    local title=$1 start=$SECONDS status
    shift
    say "$title"
    # Not `if "$@"`: there, bash would go on after a command in it that failed.
    set +e
    (set -e && "$@") >>"$LOG" 2>&1
    status=$?
    set -e
    if [ $status -ne 0 ]; then
        tail -n 40 "$LOG" >&2
        fail "failed after $((SECONDS - start)) s: $title (all of it: $LOG)"
    fi
    say "    $((SECONDS - start)) s"
}

# Debian's binary package ovmf has the version of its source package, and is in the lists that apt has already.
wanted_version() {
    apt-cache policy ovmf 2>/dev/null | sed -n 's/^ *Candidate: \([^(].*\)$/\1/p'
}

have() { [ -e "$FIRMWARE" ] && { [ -z "$VERSION" ] || [ "$(readlink "$FIRMWARE")" = "CLOUDHV-$VERSION.fd" ]; }; }

# --- the source ---------------------------------------------------------------------------

check_tools() {
    local tool missing=()
    for tool in gcc:build-essential make:build-essential dpkg-source:dpkg-dev nasm:nasm iasl:acpica-tools; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool#*:}")
    done
    [ -e /usr/include/uuid/uuid.h ] || missing+=(uuid-dev)
    # EDK2 of 2022 imports it; Python has it up to 3.11.
    if ! /usr/bin/python3 -c 'import distutils.util' 2>/dev/null && dpkg --compare-versions "$VERSION" lt 2023; then
        missing+=(python3-distutils)
    fi
    [ ${#missing[@]} -eq 0 ] || fail "these Debian packages are missing: ${missing[*]}"
}

# One deb-src line for each suite of Debian that this machine's apt knows.
source_lines() {
    local keyring
    keyring=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1) || true
    apt-get indextargets --format "deb-src ${keyring:+[signed-by=$keyring] }\$(REPO_URI) \$(RELEASE) \$(COMPONENT)" \
        'Created-By: Packages' 'Origin: Debian' | sort -u
}

# apt with lists of its own: the machine's are left as they are.
own_apt() {
    apt-get -o Dir::Etc::SourceList="$WORK/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State="$WORK/state" \
        -o Dir::State::status="$WORK/state/status" -o Dir::Cache="$WORK/cache" -o APT::Sandbox::User= \
        -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

fetch() {
    mkdir -p "$WORK"/state/lists/partial "$WORK"/cache/archives/partial
    touch "$WORK/state/status"
    source_lines >"$WORK/sources.list"
    own_apt -q update
    (cd "$WORK" && own_apt -q source "edk2=$VERSION")
    rm -rf "$WORK/state" "$WORK/cache"
    mv -T "$WORK"/edk2-*/ "$WORK/edk2"
}

# --- the build ----------------------------------------------------------------------------

# edksetup.sh reads variables that are not set, and its build its own arguments.
in_edk2() {
    (
        cd "$WORK/edk2"
        set --
        set +u
        export PYTHON_COMMAND=/usr/bin/python3 PYTHONDONTWRITEBYTECODE=1
        . ./edksetup.sh
        eval "$COMMAND"
    )
}

build_tools() {
    COMMAND="make -C BaseTools -j$(nproc)" in_edk2
}

build_firmware() {
    local toolchain=GCC5
    grep -q '_GCC5_' "$WORK/edk2/BaseTools/Conf/tools_def.template" || toolchain=GCC
    # SECURE_BOOT_ENABLE: Debian's patch that leaves out the shell when Secure Boot is enabled makes this platform's
    # build fail when it is not. Nothing is enrolled, so nothing is verified.
    COMMAND="build -a X64 -t $toolchain -b $TARGET -n $(nproc) -p OvmfPkg/CloudHv/CloudHvX64.dsc \
        -D SECURE_BOOT_ENABLE=TRUE" in_edk2
}

keep() {
    local built draft=$HERE/.CLOUDHV.$$
    built=$(ls "$WORK"/edk2/Build/CloudHvX64/${TARGET}_*/FV/CLOUDHV.fd)
    [ "$(head -c 4 "$built" | od -An -tx1)" = " 7f 45 4c 46" ] || fail "$built is no ELF file"
    cp "$built" "$draft"
    mv -T "$draft" "$HERE/CLOUDHV-$VERSION.fd"
    ln -s "CLOUDHV-$VERSION.fd" "$draft"
    mv -T "$draft" "$FIRMWARE"
}

VERSION=$(wanted_version) || true
if ! have; then
    [ "${1-}" != --if-present ] || fail "no $FIRMWARE: run tools/cloudhv.sh"
    [ -n "$VERSION" ] || fail "this machine's apt knows no package ovmf, so no source package edk2 (try apt-get update)"
    check_tools
    mkdir -p "$HERE"
    exec 9>"$HERE/lock"
    flock 9
    if ! have; then
        WORK=$(mktemp -d "$HERE/build.XXXXXX")
        trap 'rm -rf "$WORK"' EXIT
        : >"$LOG"
        step "the source of edk2 $VERSION, with Debian's patches" fetch
        step "EDK2's own tools" build_tools
        step "OvmfPkg/CloudHv, $TARGET (some minutes)" build_firmware
        keep
    fi
fi
echo "$FIRMWARE"
