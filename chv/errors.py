"""The exceptions that chv raises, one tree.

Each message is written for the person who reads it: what is wrong, in which
field or file, and what would be right. The REST server maps the class to a
status (:attr:`Error.status`) and sends the same words.
"""

from __future__ import annotations


class Error(Exception):
    """Base of every error that chv raises on purpose.

    ``status`` is the HTTP status with which the REST server reports it.
    """

    status = 500


class ConfigError(Error, ValueError):
    """A configuration, option or request body that cannot be used.

    The message starts with the path of the field, for example
    ``cpus.max_vcpus: 3 is less than cpus.boot_vcpus (4)``.
    """

    status = 400


class NotSupportedYet(ConfigError):
    """Valid in Cloud Hypervisor's interface, but not built in chv yet."""


class NotCreated(Error):
    """There is no VM (REST: nothing was created with ``vm.create``)."""

    status = 404


class StateError(Error):
    """The operation is not possible in the VM's present state."""


class ResizeError(Error):
    """A resize that cannot be carried out (zero vCPUs, more than the maximum)."""


class ResizePending(ResizeError):
    """A vCPU that the guest has not given back yet stands in the way of a resize."""

    status = 429


class ImageError(Error):
    """A kernel, initramfs, firmware or disk image that cannot be used."""


class GuestMemoryError(Error, ValueError):
    """An address or length that does not lie in guest memory."""


class BusError(Error, ValueError):
    """A device range that is empty, wraps around or overlaps another."""


class KvmError(Error, OSError):
    """An ioctl on /dev/kvm failed; ``errno`` and the ioctl's name are in the message."""


class GuestCrash(Error):
    """The guest cannot go on: triple fault, internal error, failed entry.

    The message has the exit's details, the vCPU's registers and the bytes at RIP.
    """


class DeviceError(Error):
    """A device handler broke its contract (for example read() returned no integer)."""
