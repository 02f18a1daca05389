#!/usr/bin/env bash
# Run fwts, the Firmware Test Suite, on chv's ACPI tables and print what it found.
#
#     tools/fwts.sh [--cpus boot=4,max=8] [--serial on|off] [--answered] [--log FILE]
#     tools/fwts.sh --fetch     only see to it that there is an fwts
#
# An fwts in PATH is used as it is. Else Debian's package, with the libraries that it needs, is unpacked into
# .cache/fwts, once: 12 seconds, 23 MB to download, 38 MB on disk. Debian 12 and 13 do not have it, so it comes from
# "testing", from the mirror that this machine's apt uses. Nothing is installed, and no root is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${CHV_CACHE:-$PWD/.cache}
HERE=$CACHE/fwts
NEW=$HERE.new.$$
SUITE=testing

say() { printf 'fwts: %s\n' "$*" >&2; }

# apt with lists, packages and "what is installed" (nothing) of its own.
own_apt() {
    apt-get -qq -o Dir::Etc::SourceList="$NEW/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State="$NEW/state" -o Dir::State::status="$NEW/state/status" -o Dir::Cache="$NEW/cache" \
        -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Sandbox::User= \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
}

debian_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' \
        2>/dev/null | head -n 1
}

fetch() {
    local mirror keyring loader
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        say "this machine has no apt; install fwts by hand"
        return 1
    fi
    mirror=$(debian_mirror) || true
    keyring=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1) || true
    if [ -z "$mirror" ] || [ -z "$keyring" ]; then
        say "apt here knows no Debian mirror (try apt-get update), or has no debian-archive-keyring"
        return 1
    fi
    mkdir -p "$NEW"/state/lists/partial "$NEW"/cache/archives/partial "$NEW/root"
    touch "$NEW/state/status"
    echo "deb [signed-by=$keyring] $mirror $SUITE main" >"$NEW/sources.list"
    own_apt update
    own_apt -y --no-install-recommends --download-only install fwts
    for package in "$NEW"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$NEW/root"
    done
    rm -rf "$NEW/state" "$NEW/cache" "$NEW/sources.list"
    # The package's programs need its own C library: they are started by its own loader.
    loader=$(cd "$NEW" && ls root/usr/lib/*/ld-linux-*.so.* | head -n 1)
    cat >"$NEW/fwts" <<WRAPPER
#!/bin/sh
here=\$(dirname "\$(readlink -f "\$0")")
libraries=\$here/$(dirname "$loader")
exec "\$here/$loader" --library-path "\$libraries/fwts:\$libraries" "\$here/root/usr/bin/fwts" \\
    --json-data-path="\$here/root/usr/share/fwts" "\$@"
WRAPPER
    chmod +x "$NEW/fwts"
    "$NEW/fwts" --version >/dev/null
    rm -rf "$HERE"
    mv -T "$NEW" "$HERE"
}

if ! command -v fwts >/dev/null && [ ! -x "$HERE/fwts" ]; then
    say "Debian's fwts, unpacked into $HERE"
    trap 'rm -rf "$NEW"' EXIT
    fetch
    trap - EXIT
fi
if [ "${1-}" = --fetch ]; then
    exit 0
fi
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m tests.unit.fwts_dump "$@"
