#!/usr/bin/env bash
# Build an sdist, from it a wheel for every Python >= 3.11 of this machine, and run the unit tests
# against the installed wheel: in a folder of its own, so that the checkout's chv is not found.
# $1: the folder for the junit files.
set -uo pipefail
cd "$(dirname "$0")/.."
CHECKOUT=$PWD
CACHE=${CHV_CACHE:-$CHECKOUT/.cache}
JUNIT=$(realpath -m "${1:-.work/results/junit}")
WORK=$(mktemp -d "$CACHE/pythons-XXXXXX")
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$JUNIT"
export CHV_CACHE=$CACHE PIP_DISABLE_PIP_VERSION_CHECK=1
failed=0

loudly_if_failed() {
    local log
    log=$(mktemp "$WORK/log-XXXXXX")
    if ! "$@" >"$log" 2>&1; then
        echo "pythons: failed: $*"
        tail -n 60 "$log"
        return 1
    fi
}

loudly_if_failed .venv/bin/python setup.py -q sdist --dist-dir "$WORK/dist" || exit 1

with_python() {
    local python=$1 version=$2 folder=$WORK/$2
    mkdir -p "$folder/checkout"
    # The tests and what they read, not the package: so not those that read its source or compile against it.
    git ls-files -z -- . ':!chv' | xargs -0 cp --parents -t "$folder/checkout"
    loudly_if_failed "$python" -m venv "$folder/venv" || return
    loudly_if_failed "$folder/venv/bin/pip" wheel --no-deps -w "$folder" "$WORK"/dist/chv-*.tar.gz || return
    local wheel
    wheel=$(echo "$folder"/chv-*.whl)
    loudly_if_failed "$folder/venv/bin/pip" install "${wheel}[test]" || return
    (cd "$folder/checkout" && "$folder/venv/bin/python" -m pytest -q tests/unit -p no:cacheprovider \
        --ignore=tests/unit/test_acpi_fwts.py --ignore=tests/unit/test_compiled.py \
        --ignore=tests/unit/test_virtqueue_compiled.py --ignore-glob='tests/unit/test_benchmarks_*' \
        -o junit_suite_name="python-$version" --junitxml="$JUNIT/test-python-$version.xml")
}

# The Python of .venv has run these tests already; its wheel is tried only where there is no other.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
own=$(version_of .venv/bin/python)
pythons=()
for python in $(tools/pythons.sh); do
    [ "$(version_of "$python")" = "$own" ] || pythons+=("$python")
done
[ ${#pythons[@]} -gt 0 ] || pythons=("$(tools/pythons.sh | head -n 1)")

# Two at a time: compiling is most of it.
versions=()
for python in "${pythons[@]}"; do
    version=$(version_of "$python")
    echo "pythons: $version ($python)"
    { with_python "$python" "$version" >"$WORK/output-$version" 2>&1; echo $? >"$WORK/status-$version"; } &
    versions+=("$version")
    if [ $(( ${#versions[@]} % 2 )) = 0 ]; then wait; fi
done
wait
for version in "${versions[@]}"; do
    echo "===== Python $version ====="
    cat "$WORK/output-$version"
    # From a file: bash forgets the status of a process that an earlier wait has met, if others came after it.
    [ "$(cat "$WORK/status-$version")" = 0 ] || failed=1
done
exit $failed
