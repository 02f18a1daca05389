"""virtio over PCI on the real /dev/kvm: notifications that are no exits, BARs that move, interrupts."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator

import pytest

from chv import layout
from chv._virtqueue import RamMap
from chv.exits import ExitStats
from chv.interrupts import GsiRoutes
from chv.pci.bus import PciBus, intx_gsi
from chv.virtio.transport import VirtioPci
from tests.unit.pci_machine import MEMORY, PHYS_BITS, Echo, PciMachine
from tests.unit.test_virtio_pci import Driver

from .guest import DATA, TinyGuest, eventually
from .test_interrupts import BOOT_OTHER, READY, VECTOR, count, put_listener

BAR, BAR_SIZE = layout.DEVICES_32BIT, 0x80000  # where the first device's is at power-on
NOTIFY, CONFIG, TABLE, ISR = 0x6000, 0x4000, 0x8000, 0x2000
MSIX_CONTROL = 0x84 + 2
RINGS = 0x200000
TIMES = 200


class KvmMachine(PciMachine):
    """The same bus and transports on a guest's buses and in its VM."""

    def __init__(self, guest: TinyGuest, *devices: Echo) -> None:
        self.guest = guest
        self.memory = guest.memory
        self.pio, self.mmio = guest.pio, guest.mmio
        self.bus = PciBus(layout.pci_windows(MEMORY, PHYS_BITS), lambda: None)
        self.pio.add(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_SIZE, self.bus.ports, "ports")
        self.routes = GsiRoutes(guest.vm, layout.IOAPIC_PINS)
        ram = RamMap(self.memory)
        self.transports = []
        for slot, device in enumerate(devices, 1):
            line = self.bus.line(guest.vm, slot)
            transport = VirtioPci(
                device, ram=ram, vm=guest.vm, mmio=self.mmio, routes=self.routes, line=line, slot=slot
            )
            self.bus.add(transport, slot)
            self.transports.append(transport)


class Named(Echo):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@contextlib.contextmanager
def machine(code: str, *, edi: int = 0, vcpus: int = 1) -> Iterator[KvmMachine]:
    """A guest that runs ``code`` beside the devices "first" and "second"; ecx counts from TIMES."""
    with TinyGuest(code, vcpus=vcpus, memory_size=MEMORY, registers={"rdi": edi, "rcx": TIMES}) as guest:
        made = KvmMachine(guest, Named("first"), Named("second"))
        try:
            yield made
        finally:
            made.close()


def kicks(machine: KvmMachine, slot: int = 1, queue: int = 0) -> int:
    """How often a queue was notified; its device must not be running."""
    try:
        return os.eventfd_read(machine.transports[slot - 1].queues[queue].kick_fd)
    except BlockingIOError:
        return 0


def exits(machine: KvmMachine, name: str) -> ExitStats:
    found = machine.guest.exits()
    return found.devices.get(name) or found.reasons.get(name) or ExitStats(0, 0, 0, 0, [])


def little(value: int) -> str:
    return struct.pack("<I", value).hex()


def config_write(slot: int, register: int, value: int) -> str:
    return f"""
        66 ba f8 0c                                     ; mov dx, 0xcf8
        b8 {little(1 << 31 | slot << 11 | register)}    ; mov eax, the register's address
        ef                                              ; out dx, eax
        66 ba fc 0c                                     ; mov dx, 0xcfc
        b8 {little(value)}                              ; mov eax, value
        ef                                              ; out dx, eax
    """


def store(address: int, value: int) -> str:
    return f"c7 05 {little(address)} {little(value)} ; mov dword [address], value\n"


def program(*parts: str) -> str:
    return "\n".join(line for part in parts for line in part.splitlines() if line.strip())


END = "e6 f4 ; out 0xf4, al"
WIDTHS = {1: "88 07", 2: "66 89 07", 4: "89 07"}  # mov [edi], al, ax, eax


# -- notifications --------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("queue", [0, 1])
def test_a_notification_of_any_width_is_no_exit(width: int, queue: int) -> None:
    back = 256 - len(bytes.fromhex(WIDTHS[width])) - 2
    code = program(f"{WIDTHS[width]} ; again: mov [edi]", f"e2 {back:02x} ; loop again", END)
    with machine(code, edi=BAR + NOTIFY + 4 * queue) as made:
        made.guest.run_to_done()
        assert kicks(made, queue=queue) == TIMES
        assert kicks(made, queue=1 - queue) == 0
        assert kicks(made, slot=2, queue=queue) == 0
        assert exits(made, "mmio").count == 0
        assert exits(made, "unclaimed-mmio").count == 0


def test_chains_go_to_and_fro_without_an_exit() -> None:
    """The guest adds a chain, notifies, and polls for it, over and over: as firmware does."""
    code = program(
        f"""
        66 ff 05 {little(RINGS + 0x1002)}  ; again: inc word [avail.idx]
        89 07                              ; mov [edi], eax
        66 8b 1d {little(RINGS + 0x1002)}  ; mov bx, [avail.idx]
        f3 90                              ; wait: pause
        66 39 1d {little(RINGS + 0x2002)}  ; cmp [used.idx], bx
        75 f5                              ; jne wait
        e2 e3                              ; loop again
        """,
        END,
    )
    with machine(code, edi=BAR + NOTIFY) as made:
        driver = Driver(made)
        made.memory.write(
            RINGS, struct.pack("<QIHH", DATA, 16, 2, 0)
        )  # every entry of the ring is 0: this one
        driver.negotiate()
        driver.write(0x16, 2, 0)
        driver.write(0x18, 2, 256)
        for offset, address in ((0x20, RINGS), (0x28, RINGS + 0x1000), (0x30, RINGS + 0x2000)):
            driver.write(offset, 8, address)
        driver.write(0x1C, 2, 1)
        driver.go()
        made.guest.run_to_done(60)
        assert made.guest.counter(RINGS + 0x2002, 2) == TIMES
        assert made.transports[0].queues[0].error is None
        assert exits(made, "mmio").count == 0


# -- BARs that move ---------------------------------------------------------------------------

NEW = 0xD000_0000


def test_notifications_go_where_the_guest_moves_the_bar() -> None:
    code = program(
        store(BAR + NOTIFY, 0),
        config_write(1, 0x10, NEW),
        store(NEW + NOTIFY, 0),
        store(NEW + NOTIFY, 0),
        store(BAR + NOTIFY, 0),  # nobody's now
        f"a1 {little(NEW + CONFIG)} ; mov eax, [the device's configuration]",
        END,
    )
    with machine(code) as made:
        registers = made.guest.run_to_done()
        assert kicks(made) == 3
        assert exits(made, "unclaimed-mmio").writes == 1
        assert (exits(made, "first-bar").reads, exits(made, "first-bar").writes) == (1, 0)
        assert registers["rax"] == int.from_bytes(b"abcd", "little")


def test_a_bar_that_is_switched_off_hears_nothing() -> None:
    code = program(config_write(1, 0x04, 0), store(BAR + NOTIFY, 0), config_write(1, 0x04, 2))
    with machine(program(code, store(BAR + NOTIFY, 0), END)) as made:
        made.guest.run_to_done()
        assert kicks(made) == 1
        assert exits(made, "unclaimed-mmio").writes == 1


def test_a_bar_over_memory_leaves_memory_to_the_guest() -> None:
    place = 0x100000
    code = program(config_write(1, 0x10, place), store(place + NOTIFY, 0x1234), END)
    with machine(code) as made:
        made.guest.run_to_done()
        assert made.guest.counter(place + NOTIFY) == 0x1234
        assert kicks(made) == 0
        assert exits(made, "mmio").count == 0


def test_two_bars_in_one_place_and_the_one_that_stays() -> None:
    """KVM takes one eventfd for an address: what the other is told comes to this process, and arrives."""
    code = program(
        config_write(2, 0x10, BAR),
        store(BAR + NOTIFY, 0),
        config_write(1, 0x04, 0),
        store(BAR + NOTIFY, 0),
        END,
    )
    with machine(code) as made:
        made.guest.run_to_done()
        assert (kicks(made, slot=1), kicks(made, slot=2)) == (1, 1)
        assert exits(made, "second-bar").writes == 1, "without an eventfd it is an exit"


def test_two_bars_change_places() -> None:
    other = BAR + BAR_SIZE
    code = program(
        config_write(1, 0x04, 0),
        config_write(2, 0x04, 0),
        config_write(1, 0x10, other),
        config_write(2, 0x10, BAR),
        config_write(1, 0x04, 2),
        config_write(2, 0x04, 2),
        store(other + NOTIFY, 0),
        store(BAR + NOTIFY + 4, 1),
        END,
    )
    with machine(code) as made:
        made.guest.run_to_done()
        assert (kicks(made, slot=1, queue=0), kicks(made, slot=2, queue=1)) == (1, 1)
        assert exits(made, "mmio").count == 0


# -- interrupts --------------------------------------------------------------------------------

IO_APIC = 0xFEC0_0000
REDIRECTION = 0x10 + 2 * intx_gsi(1)
LEVEL = 1 << 15
# The first vCPU routes INTA of slot 1 to the second, which counts; then it stands still.
ROUTE_PIN = program(
    BOOT_OTHER,
    store(IO_APIC, REDIRECTION + 1),
    store(IO_APIC + 0x10, 1 << 24),
    store(IO_APIC, REDIRECTION),
    store(IO_APIC + 0x10, LEVEL | VECTOR),
    store(READY, 1),
    "f4 ; hlt",
)


@contextlib.contextmanager
def listening() -> Iterator[tuple[KvmMachine, Driver]]:
    with machine(ROUTE_PIN, vcpus=2) as made:
        put_listener(made.guest)
        made.guest.start()
        eventually(lambda: made.guest.counter(READY, 1) == 1)
        yield made, Driver(made)


def test_an_msi_of_a_queue_arrives_without_an_exit() -> None:
    with listening() as (made, driver):
        made.write(1, MSIX_CONTROL, 0x8000, 2)
        driver.negotiate()
        ring = driver.ring(0, RINGS, vector=1)
        for place, value in enumerate((0xFEE0_1000, 0, VECTOR, 0)):
            driver.write(TABLE + 16 + 4 * place, 4, value)
        driver.go()
        for expected in range(1, 21):
            driver.echo(ring, b"ab")
            eventually(lambda expected=expected: count(made.guest) == expected)
        assert made.guest.exits().count == 0


def test_what_is_raised_while_masked_arrives_later_and_once() -> None:
    with listening() as (made, driver):
        made.write(1, MSIX_CONTROL, 0xC000, 2)  # the function is masked
        driver.negotiate()
        ring = driver.ring(0, RINGS, vector=1)
        for place, value in enumerate((0xFEE0_1000, 0, VECTOR, 0)):
            driver.write(TABLE + 16 + 4 * place, 4, value)
        driver.go()
        for _ in range(3):
            driver.echo(ring, b"ab")
        eventually(lambda: driver.read(0x48000, 8) == 0b10)
        assert count(made.guest) == 0
        made.write(1, MSIX_CONTROL, 0x8000, 2)
        eventually(lambda: count(made.guest) == 1)
        assert driver.read(0x48000, 8) == 0


def test_the_pin_is_up_until_the_status_is_read() -> None:
    with listening() as (made, driver):
        driver.negotiate()
        ring = driver.ring(0, RINGS)
        driver.go()
        driver.echo(ring, b"ab")
        # Nobody reads the status in the guest: the interrupt comes again after each end of interrupt.
        eventually(lambda: count(made.guest) > 3)
        assert driver.read(ISR, 1) == 1
        time.sleep(0.02)
        before = count(made.guest)
        time.sleep(0.05)
        assert count(made.guest) == before
        driver.echo(ring, b"cd")
        eventually(lambda: count(made.guest) > before)
        driver.write(0x14, 1, 0)
        time.sleep(0.02)
        before = count(made.guest)
        time.sleep(0.05)
        assert count(made.guest) == before, "a reset lowers it, too"
