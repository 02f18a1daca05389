"""The common configuration of a virtio device: who may write what, and when (virtio 1.2, 2.1 and 4.1.4.3)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from chv.virtio.common import CommonConfig
from chv.virtio.device import F_EVENT_IDX, F_VERSION_1

from .pci_machine import Echo

STATUS, GENERATION = 0x14, 0x15
OK, FEATURES_OK, NEEDS_RESET = 15, 8, 64
NO_VECTOR = 0xFFFF


# -- the registers, without PCI ----------------------------------------------------------


class Registers:
    """A common configuration with three MSI-X vectors and the device behind it."""

    def __init__(self, features: int = F_EVENT_IDX) -> None:
        self.memory = GuestMemory(1 << 20)
        ram, self.status = RamMap(self.memory), IrqStatus()
        self.device = Echo(features)
        self.queues = [
            Queue(ram, index, size, IrqSource(self.status, 1), IrqSource(self.status, 2))
            for index, size in enumerate(self.device.queue_sizes)
        ]
        self.config_irq = IrqSource(self.status, 2)
        self.common = CommonConfig(
            self.device, self.queues, self.config_irq, lambda cause, vector: vector < 3
        )
        self.read, self.write = self.common.read, self.common.write

    def __enter__(self) -> Registers:
        return self

    def __exit__(self, *_: object) -> None:
        self.common.reset()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def accept(self, features: int) -> None:
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)


FIELDS = [
    *((offset, 4) for offset in (0x00, 0x04, 0x08, 0x0C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34)),
    *((offset, 2) for offset in (0x10, 0x12, 0x16, 0x18, 0x1A, 0x1C, 0x1E, 0x3A)),
    *((offset, 1) for offset in (0x14, 0x15)),
    *((offset, 8) for offset in (0x20, 0x28, 0x30)),
]


def test_a_field_answers_at_its_offset_and_width_only() -> None:
    with Registers() as registers:
        before = registers.common.save()
        for offset in range(0x2000):
            for size in (1, 2, 4, 8):
                if (offset, size) in FIELDS:
                    continue
                assert registers.read(offset, size) == 0, (offset, size)
                registers.write(offset, size, (1 << 8 * size) - 1)
        assert registers.common.save() == before


def test_what_the_device_says_cannot_be_written() -> None:
    with Registers() as registers:
        for offset, size in ((0x04, 4), (0x12, 2), (GENERATION, 1), (0x1E, 2)):
            before = registers.read(offset, size)
            registers.write(offset, size, 0x55)
            assert registers.read(offset, size) == before


def test_all_steps_of_a_driver_in_one_write() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, OK)
        assert registers.read(STATUS, 1) == OK
        assert registers.device.starts == [([], F_VERSION_1)]


def test_a_driver_that_was_refused_may_ask_for_less() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1 | 1 << 5)
        registers.write(STATUS, 1, 3 | FEATURES_OK)
        assert registers.read(STATUS, 1) == 3
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, 3 | FEATURES_OK)
        assert registers.read(STATUS, 1) == 3 | FEATURES_OK


@pytest.mark.parametrize("bit", [16, 32, 64])
def test_bits_that_are_not_the_drivers_stay_clear(bit: int) -> None:
    with Registers() as registers:
        registers.write(STATUS, 1, 1 | bit)
        assert registers.read(STATUS, 1) == 1


class Model:
    """What the registers are to be, written down a second time: plain values, one rule a line."""

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.reset()

    def reset(self) -> None:
        self.status = self.accepted = self.driver_select = self.select = 0
        self.size, self.vector, self.enabled = [256, 256], [NO_VECTOR] * 2, [0, 0]
        self.address = [[0, 0, 0], [0, 0, 0]]

    def write(self, name: str, value: int) -> None:
        here = self.select < 2
        if name == "status":
            if value == 0:
                self.reset()
                return
            bits = self.status | value & 0x8F
            if (
                bits & 8
                and not self.status & 8
                and (self.accepted & ~self.offered or not self.accepted >> 32 & 1)
            ):
                bits &= ~8
            self.status = bits if bits & 8 else bits & ~4
        elif name == "driver_select":
            self.driver_select = value
        elif name == "accept":
            if not self.status & 8 and self.driver_select < 2:
                words = [self.accepted & 0xFFFF_FFFF, self.accepted >> 32]
                words[self.driver_select] = value
                self.accepted = words[0] | words[1] << 32
        elif name == "select":
            self.select = value
        elif name == "vector" and here:
            self.vector[self.select] = value if value < 3 else NO_VECTOR
        elif name == "reset" and here and value == 1 and self.accepted >> 40 & 1:
            self.size[self.select], self.vector[self.select] = 256, NO_VECTOR
            self.enabled[self.select], self.address[self.select] = 0, [0, 0, 0]
        elif here and not self.enabled[self.select]:
            if name == "size" and value in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                self.size[self.select] = value
            elif name == "enable" and value == 1:
                self.enabled[self.select] = 1
            elif name in ("desc", "avail", "used"):
                self.address[self.select][("desc", "avail", "used").index(name)] = value

    def seen(self) -> list[int]:
        here = self.select < 2
        s = self.select
        return [
            self.status,
            self.select,
            *([self.size[s], self.vector[s], self.enabled[s], s] if here else [0, NO_VECTOR, 0, 0]),
            *(self.address[s] if here else [0, 0, 0]),
            (self.accepted >> 32 * self.driver_select & 0xFFFF_FFFF) if self.driver_select < 2 else 0,
        ]


WRITES = {
    "status": (STATUS, 1),
    "driver_select": (0x08, 4),
    "accept": (0x0C, 4),
    "select": (0x16, 2),
    "size": (0x18, 2),
    "vector": (0x1A, 2),
    "enable": (0x1C, 2),
    "reset": (0x3A, 2),
    "desc": (0x20, 8),
    "avail": (0x28, 8),
    "used": (0x30, 8),
}
VALUES = st.sampled_from([0, 1, 2, 3, 4, 11, 15, 128, 256, 257, 512, 0x101, 0x8000, 0xFFFF, 1 << 29])
STEPS = st.lists(st.tuples(st.sampled_from(sorted(WRITES)), VALUES), max_size=40)


@settings(deadline=None)
@given(STEPS)
def test_the_registers_follow_the_model(steps: list[tuple[str, int]]) -> None:
    with Registers() as registers:
        model = Model(registers.common.offered)
        for name, value in steps:
            offset, size = WRITES[name]
            value &= (1 << 8 * size) - 1
            registers.write(offset, size, value)
            model.write(name, value)
            seen = [
                registers.read(o, s) for o, s in ((STATUS, 1), (0x16, 2), (0x18, 2), (0x1A, 2), (0x1C, 2))
            ]
            seen += [registers.read(o, s) for o, s in ((0x1E, 2), (0x20, 8), (0x28, 8), (0x30, 8), (0x0C, 4))]
            # Rings that lie nowhere break the device once it runs; the model has no rings.
            seen[0] &= ~NEEDS_RESET
            assert seen == model.seen(), (name, value)


# -- the configuration's generation (4.1.4.3.1) -------------------------------------------


def test_the_generation_is_new_before_the_device_has_told() -> None:
    with Registers() as registers:
        first = registers.read(GENERATION, 1)
        assert registers.read(GENERATION, 1) == first
        registers.device.written[0] ^= 1  # and a driver reads on before config_changed() is called
        second = registers.read(GENERATION, 1)
        assert second != first
        registers.device.config_changed()
        assert registers.read(GENERATION, 1) not in (first, second)


def test_the_generation_wraps_around() -> None:
    with Registers() as registers:
        for _ in range(300):
            registers.device.config_changed()
        assert registers.read(GENERATION, 1) == 300 % 256


def test_nobody_is_interrupted_before_driver_ok() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, 11)
        registers.device.config_changed()
        assert registers.status.value == 0
        registers.write(STATUS, 1, OK)
        registers.device.config_changed()
        assert registers.status.value == 2
