#!/bin/sh
# Print the interpreters that chv can be built for, one for each Python version >= 3.11 that this machine has.
# The first is the one that `python3` means, if that is new enough.
check='import sys, venv, sysconfig, os
if sys.version_info[:2] >= (3, 11) and sys.implementation.name == "cpython" and sys.prefix == sys.base_prefix \
        and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("%d.%d%s" % (*sys.version_info[:2], getattr(sys, "abiflags", "")), sys.executable)'

for python in python3 /usr/bin/python3 python3.11 python3.12 python3.13 python3.14 python3.15 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    if command -v "$python" >/dev/null; then
        "$python" -c "$check" 2>/dev/null
    fi
done | awk '!seen[$1]++ { print $2 }'
