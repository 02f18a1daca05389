# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Replays exits on chv's buses as the run loop does, without KVM, for benchmarks.dispatch.

It is no part of the package: it cimports chv._bus as a user's own device would.
"""
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from chv._bus cimport BUS_OK, Bus, bus_access, bus_range, take_error

cdef struct access:
    uint64_t address
    uint8_t size
    uint8_t is_write
    uint8_t is_pio
    uint8_t unused[5]


cdef size_t replay_chv(Bus pio, Bus mmio, const access *accesses, size_t count, uint32_t *hints,
                       PyObject **error) noexcept nogil:
    cdef uint8_t data[8]
    cdef uint64_t offset = 0
    cdef size_t claimed = 0
    cdef bus_range *entry
    cdef size_t i
    memset(data, 0, 8)
    for i in range(count):
        if accesses[i].is_pio:
            entry = pio.find(accesses[i].address, accesses[i].size, &hints[0], &offset)
        else:
            entry = mmio.find(accesses[i].address, accesses[i].size, &hints[1], &offset)
        if entry is NULL:
            if not accesses[i].is_write:
                memset(data, 0xFF, accesses[i].size)
        elif bus_access(entry, offset, accesses[i].size, data, accesses[i].is_write, error) == BUS_OK:
            claimed += 1
    return claimed


cdef class Replay:
    """The accesses in ``packed`` (struct access of dispatch.c, one after the other) on two buses."""

    cdef Bus pio
    cdef Bus mmio
    cdef bytes packed
    cdef size_t count
    cdef uint32_t hints[2]

    def __cinit__(self, Bus pio, Bus mmio, bytes packed):
        self.pio = pio
        self.mmio = mmio
        self.packed = packed
        self.count = len(packed) // sizeof(access)

    def run(self) -> int:
        """All of them once, without the GIL; how many belonged to a device."""
        cdef const access *accesses = <const access *><const char *>self.packed
        cdef PyObject *error = NULL
        cdef size_t claimed
        with nogil:
            claimed = replay_chv(self.pio, self.mmio, accesses, self.count, self.hints, &error)
        if error is not NULL:
            raise take_error(error)
        return claimed
