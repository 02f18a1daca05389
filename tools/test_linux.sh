#!/usr/bin/env bash
# Run tests/linux where /dev/kvm runs Linux: here, or in two testbeds side by side, one for each half.
# $1: the folder for what the tests leave behind; junit files go to its folder junit.
set -uo pipefail
cd "$(dirname "$0")/.."
RESULTS=$1
PYTHON=.venv/bin/python
PYTEST=("$PYTHON" -m pytest -v --tb=short "--chv-logs=$RESULTS/consoles")

if ! "$PYTHON" -c 'from tests.testbed import needed; raise SystemExit(not needed())'; then
    exec "${PYTEST[@]}" tests/linux "--junitxml=$RESULTS/junit/test-linux.xml"
fi

# One CPU each: two emulated CPUs of one machine do not always see code that the other one patches.
half() {
    local name=$1
    shift
    "$PYTHON" -m tests.testbed --cpus 1 --results "$RESULTS" -- \
        "${PYTEST[@]}" "$@" "--junitxml=$RESULTS/junit/test-linux-$name.xml" 2>&1 | sed -u "s/^/[$name] /"
    return "${PIPESTATUS[0]}"
}

half hotplug tests/linux/test_hotplug.py &
first=$!
half rest tests/linux --ignore=tests/linux/test_hotplug.py
status=$?
wait "$first" && exit "$status"
