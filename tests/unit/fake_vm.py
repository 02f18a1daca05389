"""A VM without a machine: the state machine of ``chv.vm.VM`` and nothing behind it."""

from __future__ import annotations

import threading
from typing import Any

from chv.config import VmConfig, VmState
from chv.errors import GuestCrash, ResizeError, ResizePending, StateError


class FakeVm:
    """``calls`` has what was asked of it; :meth:`guest_ends` plays the guest."""

    def __init__(self, config: VmConfig) -> None:
        self.config = config
        self.state = VmState.CREATED
        self.calls: list[str] = []
        self.pending = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def _set(self, call: str, state: VmState, allowed: set[VmState]) -> None:
        if self.state not in allowed:
            raise StateError(f"{call}: the VM is {self.state.value}")
        self.calls.append(call)
        self._become(state)

    def _become(self, state: VmState) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def boot(self) -> None:
        self._set("boot", VmState.RUNNING, {VmState.CREATED, VmState.SHUTDOWN})

    def pause(self) -> None:
        self._set("pause", VmState.PAUSED, {VmState.RUNNING})

    def resume(self) -> None:
        self._set("resume", VmState.RUNNING, {VmState.PAUSED})

    def shutdown(self) -> None:
        self._set("shutdown", VmState.SHUTDOWN, {VmState.RUNNING, VmState.PAUSED})

    def reboot(self) -> None:
        self._set("reboot", VmState.RUNNING, {VmState.RUNNING, VmState.PAUSED})

    def power_button(self) -> None:
        self._set("power_button", VmState.RUNNING, {VmState.RUNNING})
        self.guest_ends()

    def delete(self) -> None:
        self.calls.append("delete")
        self._become(VmState.SHUTDOWN)

    def resize(
        self,
        desired_vcpus: int | None = None,
        desired_ram: int | None = None,
        desired_balloon: int | None = None,
    ) -> None:
        if self.pending:
            raise ResizePending("desired_vcpus: vCPU 3 has not been given back yet")
        if desired_vcpus is not None:
            if not 1 <= desired_vcpus <= self.config.cpus.max_vcpus:
                raise ResizeError(f"desired_vcpus: {desired_vcpus} is not possible")
            self.config.cpus.boot_vcpus = desired_vcpus
        self.calls.append("resize")

    @property
    def info(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "state": self.state.value,
            "memory_actual_size": self.config.memory.size,
            "vcpus": [],
            "hotplug": {},
        }

    def counters(self) -> dict[str, dict[str, int]]:
        return {"__exits": {"io": 7}}

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.state is VmState.SHUTDOWN or self._failure is not None, timeout
            )
        if self._failure is not None:
            raise self._failure
        return done

    def guest_ends(self) -> None:
        self._become(VmState.SHUTDOWN)

    def guest_crashes(self, message: str) -> None:
        self._failure = GuestCrash(message)
        self._become(VmState.SHUTDOWN)
