"""Build the compiled modules; everything else about the package is in pyproject.toml.

``CHV_ANNOTATE=1`` also writes Cython's annotated HTML beside each source,
``CHV_TRACE=1`` builds with line tracing for coverage.
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

TRACE = os.environ.get("CHV_TRACE") == "1"

MODULES = {
    "chv._bus": "chv/_bus.pyx",
    "chv._kvm": "chv/_kvm.pyx",
    "chv._kvmrun": "chv/_kvmrun.pyx",
    "chv._irq": "chv/_irq.pyx",
    "chv._virtqueue": "chv/_virtqueue.pyx",
    "chv.pci._config": "chv/pci/_config.pyx",
    "chv.virtio._block": "chv/virtio/_block.pyx",
    "chv.virtio._net": "chv/virtio/_net.pyx",
    "chv.virtio._rng": "chv/virtio/_rng.pyx",
    "chv.devices._serial": "chv/devices/_serial.pyx",
    "chv.devices._timer": "chv/devices/_timer.pyx",
    "chv.devices._debug_port": "chv/devices/_debug_port.pyx",
}

extensions = [
    Extension(
        name,
        [source],
        extra_compile_args=["-O2", "-Wall", "-Wno-unused-function"],
        extra_link_args=["-pthread"],
        define_macros=[("CYTHON_TRACE_NOGIL", "1")] if TRACE else [],
    )
    for name, source in MODULES.items()
    if os.path.exists(source)
]

setup(
    ext_modules=cythonize(
        extensions,  # type: ignore[no-untyped-call]
        annotate=os.environ.get("CHV_ANNOTATE") == "1",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": True,
            "linetrace": TRACE,
        },
    ),
)
