"""Port and memory buses: sorted ranges, handlers in C or Python, statistics.

A bus finds the range that wholly holds an access. An access that no range
holds, or that crosses the edge of one, is unclaimed: it reads as all ones and
writes are dropped, as on a PC; the run loop counts it.
"""
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from typing import Protocol

from .errors import BusError, DeviceError

cdef extern from *:
    """
    static inline int chv_msb(unsigned long long v) { return 63 - __builtin_clzll(v); }
    """
    int chv_msb(unsigned long long v) noexcept nogil

cdef extern from *:
    """
    #define chv_load64(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_store64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define chv_load32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_store32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint64_t chv_load64(uint64_t *p) noexcept nogil
    void chv_store64(uint64_t *p, uint64_t v) noexcept nogil
    uint32_t chv_load32(uint32_t *p) noexcept nogil
    void chv_store32(uint32_t *p, uint32_t v) noexcept nogil

cdef uint64_t NOWHERE = <uint64_t>-1   # the base of a movable range that is not placed


class Handler(Protocol):
    """What a device written in Python has: one range's registers.

    An access lies wholly in the range; ``offset`` counts from its start, ``size`` is 1, 2, 4 or 8.
    """

    def read(self, offset: int, size: int) -> int:
        """What the guest reads: from 0 to 2 ** (8 * size) - 1."""

    def write(self, offset: int, size: int, value: int) -> object:
        """Take what the guest writes; what is returned does not matter."""


cdef class CDevice:
    """Base of devices whose registers are handled in C, without the GIL.

    ``read`` and ``write`` call the same functions as the run loop does, so a
    test can talk to the device without a VM.
    """

    def read(self, offset: int, size: int) -> int:
        """The value of the ``size``-byte register access at ``offset``."""
        cdef uint64_t value = 0
        cdef uint32_t c_size = _access_size(size)
        cdef uint64_t c_offset = offset
        cdef int result
        if self.ops.read is NULL:
            raise DeviceError(f"{type(self).__name__} has no read handler")
        with nogil:
            result = self.ops.read(self.ops.ctx, c_offset, c_size, <uint8_t *>&value)
        return self.deferred_read(offset, size) if result == BUS_DEFERRED else value

    def write(self, offset: int, size: int, value: int) -> int:
        """Write ``value``; returns what the handler asks of the run loop (0: nothing, 1: reset, 2: shutdown)."""
        cdef uint32_t c_size = _access_size(size)
        cdef uint64_t c_offset = offset
        cdef uint64_t c_value = value & ((1 << (8 * size)) - 1)
        cdef int result
        if self.ops.write is NULL:
            raise DeviceError(f"{type(self).__name__} has no write handler")
        with nogil:
            result = self.ops.write(self.ops.ctx, c_offset, c_size, <const uint8_t *>&c_value)
        if result == BUS_DEFERRED:
            self.deferred_write(offset, size, c_value)
            return BUS_OK
        return result

    def deferred_read(self, offset: int, size: int) -> int:
        """What a read gives for which the C handler returned BUS_DEFERRED."""
        raise DeviceError(f"{type(self).__name__} defers reads and has no deferred_read")

    def deferred_write(self, offset: int, size: int, value: int) -> object:
        """Take a write for which the C handler returned BUS_DEFERRED."""
        raise DeviceError(f"{type(self).__name__} defers writes and has no deferred_write")


cdef uint32_t _access_size(object size) except 0:
    if size not in (1, 2, 4, 8):
        raise ValueError(f"size: {size!r} is not an access size; allowed are 1, 2, 4 and 8 bytes")
    return size


class SlotNames:
    """The names of a VM's statistics slots; the buses of one VM share one."""

    def __init__(self):
        self.names = []

    def take(self, name: str) -> int:
        """The slot of ``name``: ranges with one name are counted together."""
        if name in self.names:
            return FIRST_DEVICE_SLOT + self.names.index(name)
        if FIRST_DEVICE_SLOT + len(self.names) >= MAX_SLOTS:
            raise BusError(f"{name}: too many devices; {MAX_SLOTS - FIRST_DEVICE_SLOT} are allowed")
        self.names.append(name)
        return FIRST_DEVICE_SLOT + len(self.names) - 1


cdef class Bus:
    """Ranges of one address space, each with its handler.

    ``limit`` is the first address beyond the space (0x10000 for ports, 0 for all of 2**64).
    """

    def __cinit__(self, str name, limit, slots):
        self.name = name
        self.limit = limit
        self.entries = []
        self.handlers = {}
        self.slots = slots
        self.table = _build(self.entries)

    def __dealloc__(self):
        # Only C data here: a bus that goes with a reference cycle has lost its Python attributes.
        cdef bus_table *older
        cdef uint32_t i
        for i in range(self.movable_count):
            free(self.movable[i])
        while self.table is not NULL:
            older = self.table.older
            free(self.table)
            self.table = older

    def add(self, base: int, size: int, handler: object, name: str = "") -> None:
        """Claim ``size`` bytes from ``base`` for ``handler``.

        ``handler`` is a :class:`CDevice` or any object with ``read(offset, size) -> int`` and
        ``write(offset, size, value)``. Raises :class:`chv.errors.BusError` for a range that is
        empty, leaves the address space or overlaps another.
        """
        label = name or type(handler).__name__
        top = self.limit or 1 << 64
        # A size of 2**64 does not fit a table's entry.
        if size <= 0 or base < 0 or base + size > top or size >> 64:
            raise BusError(
                f"{label}: range {base:#x}+{size:#x} does not lie in the {self.name} space (0 to {top - 1:#x})")
        for other in self.entries:
            if base < other[0] + other[1] and other[0] < base + size:
                raise BusError(
                    f"{label}: {self.name} range {base:#x}-{base + size - 1:#x} overlaps "
                    f"{other[3]} at {other[0]:#x}-{other[0] + other[1] - 1:#x}")
        _check_handler(handler, label)
        entries = sorted([*self.entries, (base, size, handler, label, self.slots.take(label))],
                         key=lambda entry: entry[0])
        self._publish(entries)

    def remove(self, base: int) -> None:
        """Give up the range that starts at ``base``; :class:`BusError` if there is none."""
        entries = [entry for entry in self.entries if entry[0] != base]
        if len(entries) == len(self.entries):
            raise BusError(f"no {self.name} range starts at {base:#x}")
        self._publish(entries)

    def add_movable(self, size: int, handler: object, name: str = "") -> int:
        """A range that has no place yet, such as a BAR; returns the number that :meth:`place` takes.

        It never gets an access that another range or RAM claims; of movable ranges that overlap, the one
        that was added first wins. So a guest may put it anywhere without harm, as often as it likes.
        """
        label = name or type(handler).__name__
        if not 0 < size < 1 << 63:
            raise BusError(f"{label}: a size of {size:#x} bytes; allowed is 1 to 2**63 - 1")
        _check_handler(handler, label)
        if self.movable_count == MAX_MOVABLE:
            raise BusError(f"{label}: too many movable ranges; {MAX_MOVABLE} are allowed")
        cdef bus_range *entry = <bus_range *>calloc(1, sizeof(bus_range))
        if entry is NULL:
            raise MemoryError
        try:
            _fill(entry, 0, size, handler, self.slots.take(label))
        except BaseException:
            free(entry)
            raise
        entry.base = NOWHERE
        self.handlers[id(handler)] = handler
        self.movable[self.movable_count] = entry
        chv_store32(&self.movable_count, self.movable_count + 1)
        return self.movable_count - 1

    def place(self, number: int, base: int | None) -> None:
        """Move a range of :meth:`add_movable` to ``base``, or nowhere; :class:`BusError` if it does not fit there.

        A vCPU may still be in its handler, called by an access to the old place.
        """
        if not 0 <= number < self.movable_count:
            raise BusError(f"no movable {self.name} range has number {number}")
        cdef bus_range *entry = self.movable[number]
        top = self.limit or 1 << 64
        if base is not None and not 0 <= base <= top - entry.size:
            raise BusError(f"{base:#x}+{entry.size:#x} does not lie in the {self.name} space (0 to {top - 1:#x})")
        chv_store64(&entry.base, NOWHERE if base is None else <uint64_t>base)

    def ranges(self) -> list:
        """(base, size, name) of each range, in order of address."""
        return [(entry[0], entry[1], entry[3]) for entry in self.entries]

    def read(self, address: int, size: int) -> int:
        """Read as a vCPU would; all ones if nothing claims the access."""
        cdef uint64_t value = ~<uint64_t>0
        self._access(address, _access_size(size), <uint8_t *>&value, False)
        return value & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int) -> int:
        """Write as a vCPU would; dropped if nothing claims the access."""
        cdef uint32_t c_size = _access_size(size)
        cdef uint64_t data = value & ((1 << (8 * size)) - 1)
        return self._access(address, c_size, <uint8_t *>&data, True)

    cdef int _access(self, uint64_t address, uint32_t size, uint8_t *data, bint is_write) except? -1:
        cdef uint32_t hint = self.hint
        cdef PyObject *error = NULL
        cdef int result
        cdef uint64_t offset = 0
        cdef bus_range *entry
        with nogil:
            entry = self.find(address, size, &hint, &offset)
            result = BUS_OK if entry is NULL else bus_access(entry, offset, size, data, is_write, &error)
        self.hint = hint
        if error is not NULL:
            raise take_error(error)
        return result

    def _publish(self, entries):
        # Another thread may be searching the old table without the GIL, so it is kept; the
        # machine's ranges change rarely (a BAR that moves), and all go with the bus.
        cdef bus_table *table = _build(entries)
        table.older = self.table
        # Handlers stay alive as long as the bus: a call may be under way.
        self.handlers.update((id(entry[2]), entry[2]) for entry in entries)
        self.entries = entries
        self.table = table

    cdef bus_range *find(self, uint64_t address, uint64_t size, uint32_t *hint, uint64_t *offset) noexcept nogil:
        """The range that wholly holds the access, and where in it; NULL if there is none."""
        cdef bus_table *table = self.table
        cdef uint32_t low = 0
        cdef uint32_t left = table.count
        cdef uint32_t half
        cdef bus_range *entry
        if hint[0] < left:
            entry = &table.ranges[hint[0]]
            offset[0] = address - entry.base
            if offset[0] < entry.size:
                return entry if entry.size - offset[0] >= size else NULL
        # The last range that does not begin behind the address. Without branches: a processor guesses wrong
        # half of those that depend on an address, and a wrong guess takes as long as the rest of the search.
        while left > 1:
            half = left >> 1
            low += half * <uint32_t>(table.bases[low + half] <= address)
            left -= half
        entry = &table.ranges[low]   # of an empty table too: its size is 0
        offset[0] = address - entry.base
        if offset[0] < entry.size:
            hint[0] = low
            return entry if entry.size - offset[0] >= size else NULL
        return self.find_movable(address, size, offset)

    cdef bus_range *find_movable(self, uint64_t address, uint64_t size, uint64_t *offset) noexcept nogil:
        cdef uint32_t count = chv_load32(&self.movable_count)
        cdef bus_range *entry
        cdef uint64_t base
        cdef uint32_t i
        for i in range(count):
            entry = self.movable[i]
            # Read once: another vCPU may move the range between the check and the use.
            base = chv_load64(&entry.base)
            if base == NOWHERE or address - base >= entry.size:
                continue
            offset[0] = address - base
            return entry if entry.size - offset[0] >= size else NULL
        return NULL


cdef int _check_handler(object handler, str label) except -1:
    if isinstance(handler, CDevice):
        if (<CDevice>handler).ops.read is NULL or (<CDevice>handler).ops.write is NULL:
            raise BusError(f"{label}: the device has no handlers; its __cinit__ must set ops.read and ops.write")
        return 0
    for method in ("read", "write"):
        if not callable(getattr(handler, method, None)):
            raise BusError(f"{label}: the handler has no {method}() method")
    return 0


cdef int _fill(bus_range *entry, base, size, handler, slot) except -1:
    entry.base = base
    entry.size = size
    entry.slot = slot
    entry.handler = <PyObject *>handler
    if isinstance(handler, CDevice):
        entry.ops = (<CDevice>handler).ops
    return 0


cdef bus_table *_build(list entries) except NULL:
    cdef size_t count = len(entries)
    cdef size_t room = sizeof(bus_table) + count * sizeof(bus_range)
    cdef bus_table *table = <bus_table *>calloc(1, room + count * sizeof(uint64_t))
    cdef size_t i
    if table is NULL:
        raise MemoryError
    table.count = count
    table.bases = <uint64_t *>(<char *>table + room)
    for i in range(count):
        base, size, handler, _, slot = entries[i]
        _fill(&table.ranges[i], base, size, handler, slot)
        table.bases[i] = base
    return table


cdef int bus_access(bus_range *entry, uint64_t offset, uint32_t size, uint8_t *data,
                    bint is_write, PyObject **error) noexcept nogil:
    return bus_access_many(entry, offset, size, 1, data, is_write, error)


cdef int bus_access_many(bus_range *entry, uint64_t offset, uint32_t size, uint32_t count, uint8_t *data,
                         bint is_write, PyObject **error) noexcept nogil:
    """``count`` accesses of one width at one place, one after the other, until one is not BUS_OK."""
    cdef int result = BUS_OK
    if entry.ops.read is NULL:
        with gil:  # once: each time it is asked for, another Python thread may keep it for milliseconds
            while count and result == BUS_OK:
                result = _python_access(<object>entry.handler, False, offset, size, data, is_write, error)
                data += size
                count -= 1
        return result
    while count and result == BUS_OK:
        if is_write:
            result = entry.ops.write(entry.ops.ctx, offset, size, data)
        else:
            result = entry.ops.read(entry.ops.ctx, offset, size, data)
        if result == BUS_DEFERRED:
            with gil:
                result = _python_access(<object>entry.handler, True, offset, size, data, is_write, error)
        data += size
        count -= 1
    return result


cdef int _python_access(object handler, bint deferred, uint64_t offset, uint32_t size, uint8_t *data,
                        bint is_write, PyObject **error) noexcept:
    """What is left to Python: a handler's ``read`` or ``write``, or what a device in C has ``deferred``."""
    cdef uint64_t value = 0
    try:
        if is_write:
            memcpy(&value, data, size)
            if deferred:
                handler.deferred_write(offset, size, value)
            else:
                handler.write(offset, size, value)
        else:
            result = handler.deferred_read(offset, size) if deferred else handler.read(offset, size)
            value = _answer(handler, result, offset, size)
            memcpy(data, &value, size)
    except BaseException as exception:
        Py_INCREF(exception)
        error[0] = <PyObject *>exception
        return BUS_EXCEPTION
    return BUS_OK


cdef uint64_t _answer(object handler, object result, uint64_t offset, uint32_t size) except? 0xE0E0E0E0E0E0E0E0:
    """What ``read`` returned, if it is one of the numbers that it may return."""
    cdef uint64_t most = (~<uint64_t>0) >> (64 - 8 * size)
    cdef uint64_t value
    if isinstance(result, int):
        try:
            value = result
            if value <= most:
                return value
        except OverflowError:
            pass  # negative, or above 64 bits
    raise DeviceError(
        f"{type(handler).__name__}.read({offset:#x}, {size}) returned {result!r}; "
        f"allowed is an integer from 0 to {most:#x}")


cdef object take_error(PyObject *error):
    """The exception that a handler left behind, its reference handed over."""
    exception = <object>error
    Py_DECREF(exception)
    return exception


cdef int stats_record(exit_stats *stats, uint32_t slot, bint is_write, uint64_t ticks) noexcept nogil:
    """Count one access. The first one of a slot allocates its counters; -1 if there is no memory."""
    cdef slot_stats *entry = stats.slots[slot]
    cdef int msb
    if entry is NULL:
        entry = <slot_stats *>calloc(1, sizeof(slot_stats))
        if entry is NULL:
            return -1
        stats.slots[slot] = entry
    if is_write:
        entry.writes += 1
    else:
        entry.reads += 1
    entry.ticks += ticks
    if ticks > entry.max_ticks:
        entry.max_ticks = ticks
    if ticks < 4:
        entry.histogram[ticks] += 1
    else:
        msb = chv_msb(ticks)
        entry.histogram[4 * (msb - 1) + ((ticks >> (msb - 2)) & 3)] += 1
    return 0


cdef void stats_free(exit_stats *stats) noexcept nogil:
    cdef int i
    for i in range(MAX_SLOTS):
        free(stats.slots[i])
        stats.slots[i] = NULL


cdef dict stats_snapshot(exit_stats *stats):
    """slot -> (reads, writes, ticks, max_ticks, {bucket: count}); read while the guest runs."""
    cdef int i, bucket
    cdef slot_stats *entry
    result = {}
    for i in range(MAX_SLOTS):
        entry = stats.slots[i]
        if entry is not NULL:
            histogram = {bucket: entry.histogram[bucket]
                         for bucket in range(HISTOGRAM_BUCKETS) if entry.histogram[bucket]}
            result[i] = (entry.reads, entry.writes, entry.ticks, entry.max_ticks, histogram)
    return result


def bucket_bounds(bucket: int) -> tuple:
    """The lowest tick count of a histogram bucket and the lowest beyond it."""
    def low(index):
        return index if index < 4 else (4 + index % 4) << (index // 4 - 1)
    return low(bucket), low(bucket + 1)


def buffer_address(buffer: object) -> int:
    """Where a writable buffer lies in this process. The caller keeps the buffer alive."""
    cdef uint8_t[::1] view = buffer
    return <size_t>&view[0]
