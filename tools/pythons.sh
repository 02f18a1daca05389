#!/bin/sh
# Print the interpreters that chv can be built for, one for each Python version >= 3.11 that this machine has.
# The first is the one that `python3` means, if that is new enough; of a virtual environment, the one it was made with.
check='import sys, venv, sysconfig, os
python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
header = os.path.join(sysconfig.get_path("include", vars={"installed_base": sys.base_prefix}), "Python.h")
if sys.version_info[:2] >= (3, 11) and sys.implementation.name == "cpython" and os.path.exists(header):
    print("%d.%d%s" % (*sys.version_info[:2], sys.abiflags), python)'

for python in python3 /usr/bin/python3 python3.11 python3.12 python3.13 python3.14 python3.15 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    if command -v "$python" >/dev/null; then
        "$python" -c "$check" 2>/dev/null
    fi
done | awk '!seen[$1]++ { print $2 }'
