"""PCI configuration space: reads without the GIL, by ports and by memory.

A kernel reads thousands of registers when it scans the bus; it writes few. So reads are served here from
the bytes, and writes go to the function's Python code. PCI Local Bus 3.0, 3.2.2.3.2 (mechanism 1);
PCI Express Base 5.0, 7.2.2 (ECAM).
"""
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from .._bus cimport BUS_DEFERRED, BUS_OK, CDevice
from .._irq cimport IrqStatus

cdef enum:
    SPACE_SIZE = 4096
    SLOTS = 32
    STATUS = 6                 # the low byte of the status register
    STATUS_INTERRUPT = 1 << 3

cdef uint32_t ENABLE = <uint32_t>1 << 31
cdef uint32_t ADDRESS_BITS = <uint32_t>0x80FFFFFC

cdef struct config_space:
    uint8_t data[SPACE_SIZE]
    uint8_t mask[SPACE_SIZE]   # the bits that a guest can write
    uint16_t hook_first        # reads in [first, end) are left to Python
    uint16_t hook_end
    const uint8_t *isr         # not 0: the function has an interrupt for its pin; NULL: it has no pin

cdef struct config_root:
    uint32_t address           # what was written to 0xcf8
    config_space *spaces[SLOTS]

cdef enum:
    ADDRESS_PORT = 0   # offsets of the port range
    RESET_PORT = 1
    DATA_PORT = 4


cdef int space_read(config_space *space, uint32_t reg, uint32_t size, uint8_t *data) noexcept nogil:
    if space is NULL:
        memset(data, 0xFF, size)
        return BUS_OK
    if reg < space.hook_end and reg + size > space.hook_first:
        return BUS_DEFERRED
    space_copy(space, reg, size, data)
    return BUS_OK


cdef void space_copy(config_space *space, uint32_t reg, uint32_t size, uint8_t *data) noexcept nogil:
    memcpy(data, &space.data[reg], size)
    if reg <= STATUS and STATUS < reg + size and space.isr is not NULL and space.isr[0]:
        data[STATUS - reg] |= STATUS_INTERRUPT


cdef bint port_target(config_root *root, uint64_t offset, uint32_t size, uint32_t *slot, uint32_t *reg) noexcept nogil:
    """Which reg an access to 0xcfc-0xcff means; False if it means none."""
    cdef uint32_t address = root.address
    if offset < DATA_PORT or offset + size > DATA_PORT + 4 or not address & ENABLE:
        return False
    if address & 0x00FF0700:   # bus and function: there is only 0
        return False
    slot[0] = (address >> 11) & 31
    reg[0] = (address & 0xFC) + <uint32_t>(offset - DATA_PORT)
    return True


cdef int ports_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    cdef config_root *root = <config_root *>ctx
    cdef uint32_t slot, reg
    if offset == ADDRESS_PORT and size == 4:
        memcpy(data, &root.address, 4)
        return BUS_OK
    if not port_target(root, offset, size, &slot, &reg):
        memset(data, 0xFF, size)
        return BUS_OK
    return space_read(root.spaces[slot], reg, size, data)


cdef int ports_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef config_root *root = <config_root *>ctx
    cdef uint32_t slot, reg
    if offset == ADDRESS_PORT and size == 4:
        memcpy(&root.address, data, 4)
        root.address &= ADDRESS_BITS
        return BUS_OK
    if offset == RESET_PORT and size == 1:
        return BUS_DEFERRED
    if not port_target(root, offset, size, &slot, &reg) or root.spaces[slot] is NULL:
        return BUS_OK
    return BUS_DEFERRED


cdef bint ecam_target(uint64_t offset, uint32_t size, uint32_t *slot, uint32_t *reg) noexcept nogil:
    if offset >> 20 or offset & 0x7000:   # bus, function
        return False
    slot[0] = <uint32_t>(offset >> 15) & 31
    reg[0] = <uint32_t>offset & (SPACE_SIZE - 1)
    return reg[0] + size <= SPACE_SIZE


cdef int ecam_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    cdef uint32_t slot, reg
    if not ecam_target(offset, size, &slot, &reg):
        memset(data, 0xFF, size)
        return BUS_OK
    return space_read((<config_root *>ctx).spaces[slot], reg, size, data)


cdef int ecam_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef uint32_t slot, reg
    if not ecam_target(offset, size, &slot, &reg) or (<config_root *>ctx).spaces[slot] is NULL:
        return BUS_OK
    return BUS_DEFERRED


cdef class ConfigSpace:
    """The 4096 bytes of one function, and which of their bits a guest can write."""
    cdef config_space space
    cdef IrqStatus interrupt   # owns what space.isr points to

    def get(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at ``offset``."""
        cdef uint8_t data[8]
        _check(offset, size)
        space_copy(&self.space, offset, size, data)
        return int.from_bytes((<char *>data)[:size], "little")

    def show_interrupt(self, interrupt: IrqStatus) -> None:
        """Bit 3 of the status register is set while ``interrupt`` is not 0 (PCI Local Bus 3.0, 6.2.3)."""
        self.interrupt = interrupt
        self.space.isr = &self.interrupt.isr

    def set(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        """Give a reg its value and say which of its bits a guest can write."""
        _check(offset, size)
        for index in range(size):
            self.space.data[<int>offset + <int>index] = (value >> 8 * index) & 0xFF
            self.space.mask[<int>offset + <int>index] = (writable >> 8 * index) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Write as a guest does: only bits that are writable change."""
        cdef uint8_t mask
        cdef int place
        _check(offset, size)
        for index in range(size):
            place = offset + index
            mask = self.space.mask[place]
            self.space.data[place] = (self.space.data[place] & ~mask) | ((value >> 8 * index) & mask)

    def hook(self, first: int, end: int) -> None:
        """Leave reads in ``first`` to ``end`` - 1 to the function."""
        self.space.hook_first = first
        self.space.hook_end = end

    def dump(self) -> bytes:
        """All of it."""
        return (<char *>self.space.data)[:SPACE_SIZE]

    def restore(self, data: bytes) -> None:
        """Take over what :meth:`dump` gave."""
        if len(data) != SPACE_SIZE:
            raise ValueError(f"configuration space: {len(data)} bytes; exactly {SPACE_SIZE} are allowed")
        memcpy(self.space.data, <const char *>data, SPACE_SIZE)


cdef int _check(offset, size) except -1:
    if offset < 0 or not 1 <= size <= 8 or offset + size > SPACE_SIZE:
        raise ValueError(f"configuration space: no register of 1 to 8 bytes: {size} bytes at {offset:#x}")
    return 0


cdef class ConfigRoot:
    """The functions of bus 0: slot -> configuration space and the object whose ``read`` and ``write`` take the rest."""
    cdef config_root root
    cdef readonly dict functions
    cdef list spaces

    def __cinit__(self):
        memset(&self.root, 0, sizeof(self.root))
        self.functions = {}
        self.spaces = []

    def add(self, slot: int, space: ConfigSpace, function: object) -> None:
        if not 0 <= slot < SLOTS or slot in self.functions:
            raise ValueError(f"PCI slot {slot} is taken or not in 0..{SLOTS - 1}")
        self.functions[slot] = function
        self.spaces.append(space)
        self.root.spaces[<int>slot] = &space.space

    @property
    def address(self) -> int:
        """The address reg of mechanism 1."""
        return self.root.address

    @address.setter
    def address(self, value: int) -> None:
        self.root.address = value & ADDRESS_BITS


cdef class ConfigPorts(CDevice):
    """Ports 0xcf8 to 0xcff. ``on_reset`` is called for a reset by port 0xcf9."""
    cdef ConfigRoot root
    cdef object on_reset

    def __cinit__(self, ConfigRoot root, on_reset):
        self.root = root
        self.on_reset = on_reset
        self.ops.read = ports_read
        self.ops.write = ports_write
        self.ops.ctx = &root.root

    def deferred_read(self, offset: int, size: int) -> int:
        cdef uint32_t slot = 0, reg = 0
        if not port_target(&self.root.root, offset, size, &slot, &reg):
            return (1 << 8 * size) - 1
        return self.root.functions[slot].read(reg, size)

    def deferred_write(self, offset: int, size: int, value: int) -> None:
        cdef uint32_t slot = 0, reg = 0
        if offset == RESET_PORT:
            if value & 4:   # the reset control reg's RST_CPU
                self.on_reset()
        elif port_target(&self.root.root, offset, size, &slot, &reg) and slot in self.root.functions:
            self.root.functions[slot].write(reg, size, value)


cdef class ConfigMemory(CDevice):
    """The ECAM area."""
    cdef ConfigRoot root

    def __cinit__(self, ConfigRoot root):
        self.root = root
        self.ops.read = ecam_read
        self.ops.write = ecam_write
        self.ops.ctx = &root.root

    def deferred_read(self, offset: int, size: int) -> int:
        cdef uint32_t slot = 0, reg = 0
        ecam_target(offset, size, &slot, &reg)
        return self.root.functions[slot].read(reg, size)

    def deferred_write(self, offset: int, size: int, value: int) -> None:
        cdef uint32_t slot = 0, reg = 0
        if ecam_target(offset, size, &slot, &reg) and slot in self.root.functions:
            self.root.functions[slot].write(reg, size, value)
