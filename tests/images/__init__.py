"""A disk image in the shape of Clear Linux's KVM image, from Debian packages.

For tests, benchmarks and the demo:

>>> image = find().copy(tmp_path)                               # doctest: +SKIP
>>> chv.VM(disks=[f"path={image.path}"])                        # doctest: +SKIP
>>> subprocess.run(image.ssh("uname -r"))                       # doctest: +SKIP

``python -m tests.images`` builds it under ``.cache/images/``, with its ssh key beside it.
``cloudhv()`` is EDK2's firmware for it, which tools/cloudhv.sh builds.
"""

from __future__ import annotations

from tests.images.firmware import cloudhv
from tests.images.image import ClearImage, find

__all__ = ["ClearImage", "cloudhv", "find"]
