"""The VMM behind the REST API and the command line: at most one VM, and what may be done when.

A VM is first a configuration (:meth:`Vmm.create`) and becomes a machine at :meth:`Vmm.boot`,
as in Cloud Hypervisor. Every method may be called from any thread. What fails raises
:class:`ActionError`, whose :func:`error_chain` reads from the action down to the cause.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .config import VmConfig, VmState, check_memory_size, validate
from .errors import ConfigError, Error, NotCreated, NotSupportedYet, ResizeError, StateError
from .logs import Logger
from .version import __version__

log = Logger(__name__)

CREATED_FIRST = "VM config is missing: create the VM first"
NOT_RUNNING = "VM is not running"


class Machine(Protocol):
    """What the VMM needs of a VM: :class:`chv.vm.VM`, or a stand-in for it in tests."""

    @property
    def state(self) -> VmState: ...
    @property
    def info(self) -> dict[str, Any]: ...
    def boot(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def shutdown(self) -> None: ...
    def reboot(self) -> None: ...
    def power_button(self) -> None: ...
    def delete(self) -> None: ...
    def resize(
        self,
        desired_vcpus: int | None = None,
        desired_ram: int | None = None,
        desired_balloon: int | None = None,
    ) -> None: ...
    def counters(self) -> dict[str, dict[str, int]]: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class ActionError(Error):
    """Something that was asked of the VMM failed; the cause is in ``__cause__``.

    ``status`` is the cause's.
    """

    def __init__(self, action: str, cause: BaseException) -> None:
        super().__init__(action)
        self.status = getattr(cause, "status", Error.status)


def error_chain(error: BaseException) -> list[str]:
    """The messages of ``error`` and of its causes, outermost first."""
    messages: list[str] = []
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        if not isinstance(link, (Error, OSError)):
            text = f"{type(link).__name__}: {text}"
        told = isinstance(link, OSError) and link.strerror and messages and link.strerror in messages[-1]
        if not told and (not messages or text not in messages[-1]):
            messages.append(text)
        link = link.__cause__
    return messages


class Vmm:
    """Holds at most one VM.

    ``no_shutdown`` keeps the VMM alive when the guest powers itself off or fails. ``new_vm`` makes
    the machine from a configuration (:class:`chv.vm.VM`).
    """

    def __init__(
        self, *, no_shutdown: bool = False, new_vm: Callable[[VmConfig], Machine] | None = None
    ) -> None:
        self.no_shutdown = no_shutdown
        self._new_vm = new_vm or _new_vm
        self._lock = threading.RLock()
        self._config: VmConfig | None = None
        self._vm: Machine | None = None
        self._watched: object = None  # stands for one run of the guest; None once it was ended from here
        self._exit = threading.Event()
        self._failure: BaseException | None = None

    # -- the VMM itself ------------------------------------------------------------

    def ping(self) -> dict[str, Any]:
        return {
            "build_version": f"v{__version__}",
            "version": __version__,
            "pid": os.getpid(),
            "features": [],
        }

    def wait(self, timeout: float | None = None) -> bool:
        """Until the VMM is to exit (True), or for ``timeout`` seconds (then False).

        It is to exit when :meth:`shutdown_vmm` or :meth:`request_exit` was called, or when the guest
        ended (not with ``no_shutdown``). Raises what the guest failed with.
        """
        if not self._exit.wait(timeout):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def request_exit(self) -> None:
        """Make :meth:`wait` return. Leaves the VM to :meth:`delete`."""
        self._exit.set()

    def shutdown_vmm(self) -> None:
        """Delete the VM, then let :meth:`wait` return."""
        with self._action("The VMM could not shut down"):
            self.delete()
            self.request_exit()

    # -- the VM --------------------------------------------------------------------

    @property
    def state(self) -> VmState | None:
        """None without a VM."""
        with self._lock:
            if self._vm is not None:
                return self._vm.state
            return None if self._config is None else VmState.CREATED

    def create(self, config: VmConfig) -> None:
        """Take ``config``; its rules are checked by :meth:`boot`."""
        with self._action("The VM could not be created"):
            if self._config is not None:
                raise StateError("VM is already created")
            self._config = config

    def boot(self) -> None:
        """Make the machine and start it; from ``Shutdown``, start it again."""
        with self._action("The VM could not boot"):
            if self._config is None:
                raise NotCreated(CREATED_FIRST)
            if self._vm is None:
                self._vm = self._booted(self._config)
            elif self._vm.state == VmState.SHUTDOWN:
                self._vm.boot()
            else:
                raise StateError(f"VM is already booted: it is {self._vm.state.value}")
            self._watch(self._vm)

    def _booted(self, config: VmConfig) -> Machine:
        validate(config)
        vm = self._new_vm(config)
        try:
            vm.boot()
        except BaseException:
            vm.delete()
            raise
        return vm

    def delete(self) -> None:
        """Forget the VM, shutting it down first if need be. Fine without one."""
        with self._action("The VM could not be deleted"):
            vm, self._vm, self._config, self._watched = self._vm, None, None, None
            if vm is not None:
                vm.delete()

    def pause(self) -> None:
        with self._action("The VM could not be paused"):
            self._running().pause()

    def resume(self) -> None:
        with self._action("The VM could not resume"):
            self._running().resume()

    def shutdown(self) -> None:
        """Stop the guest without asking it. It can be booted again."""
        with self._action("The VM could not shut down"):
            self._running().shutdown()
            self._watched = None

    def reboot(self) -> None:
        with self._action("The VM could not reboot"):
            if self._vm is None:
                raise NotCreated(CREATED_FIRST if self._config is None else "VM is not booted")
            self._vm.reboot()

    def power_button(self) -> None:
        """Press the button: the guest decides what happens."""
        with self._action("The power button could not be pressed"):
            self._running().power_button()

    def resize(
        self,
        desired_vcpus: int | None = None,
        desired_ram: int | None = None,
        desired_balloon: int | None = None,
    ) -> None:
        """Change the number of vCPUs or the bytes of RAM; before boot, change the configuration."""
        with self._action("The VM could not be resized"):
            if self._config is None:
                raise NotCreated(CREATED_FIRST)
            if self._vm is None:
                _resize_config(self._config, desired_vcpus, desired_ram, desired_balloon)
            else:
                self._vm.resize(desired_vcpus, desired_ram, desired_balloon)

    def info(self) -> dict[str, Any]:
        """``config``, ``state``, ``memory_actual_size``; for a machine also ``vcpus`` and ``hotplug``."""
        with self._action("The VM's information is not available"):
            if self._config is None:
                raise NotCreated("VM is not created")
            if self._vm is not None:
                return self._vm.info
            return {
                "config": self._config.to_dict(),
                "state": VmState.CREATED.value,
                "memory_actual_size": self._config.memory.size,
            }

    def counters(self) -> dict[str, dict[str, int]]:
        with self._action("The VM's counters are not available"):
            return self._running().counters()

    # -- helpers -------------------------------------------------------------------

    def _running(self) -> Machine:
        if self._vm is None:
            raise StateError(NOT_RUNNING)
        return self._vm

    @contextmanager
    def _action(self, failed: str) -> Iterator[None]:
        """One action at a time; what fails in it becomes an :class:`ActionError` saying ``failed``."""
        with self._lock:
            try:
                yield
            except ActionError:
                raise
            except (Error, OSError) as error:
                raise ActionError(failed, error) from error

    def _watch(self, vm: Machine) -> None:
        """Notice when the guest ends by itself, from a thread of its own."""
        run = self._watched = object()
        threading.Thread(target=self._watch_guest, args=(vm, run), name="guest-watch", daemon=True).start()

    def _watch_guest(self, vm: Machine, run: object) -> None:
        failure: BaseException | None = None
        try:
            while vm.wait() and vm.state != VmState.SHUTDOWN:
                time.sleep(0.05)  # it ended and was booted again in between
        except Exception as error:
            failure = error
        with self._lock:
            if run is not self._watched:
                return  # it was ended from here
            if failure is None:
                log.info("the guest has shut down")
            elif self.no_shutdown:  # otherwise wait() raises it
                log.error("the guest failed: %s", ": ".join(error_chain(failure)))
            if not self.no_shutdown:
                self._failure = failure
                self._exit.set()


def _new_vm(config: VmConfig) -> Machine:
    from .vm import VM

    machine: Machine = VM(config)
    return machine


def _resize_config(config: VmConfig, vcpus: int | None, ram: int | None, balloon: int | None) -> None:
    if balloon is not None:
        raise NotSupportedYet("desired_balloon: the balloon: chv does not support this yet")
    most = config.cpus.max_vcpus
    if vcpus is not None and not 1 <= vcpus <= most:
        raise ResizeError(f"desired_vcpus: {vcpus} is not possible; allowed are 1 to {most} (cpus.max_vcpus)")
    if ram is not None:
        try:
            check_memory_size(ram, "desired_ram")
        except ConfigError as error:
            raise ResizeError(str(error)) from error
        config.memory.size = ram
    if vcpus is not None:
        config.cpus.boot_vcpus = vcpus
