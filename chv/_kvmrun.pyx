"""The KVM_RUN loop.

One :class:`VcpuRun` per vCPU. Its loop runs without the GIL: KVM_RUN, then the
bus, then the handler, which only takes the GIL when it is a Python object.
Layout of the shared area and meaning of each exit: the kernel's
Documentation/virt/kvm/api.rst, section 5.
"""
import os
import signal
import time

from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ._bus cimport (BUS_EXCEPTION, BUS_OK, BUS_RESET, BUS_SHUTDOWN, FIRST_DEVICE_SLOT, Bus, bus_access, bus_access_many,
                    bus_range, exit_stats, stats_free, stats_record, stats_snapshot, take_error)
from ._kvm cimport *

from .errors import KvmError

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "sys/mman.h" nogil:
    enum: PROT_READ, PROT_WRITE, MAP_SHARED
    void *MAP_FAILED
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_kill(pthread_t thread, int sig)

cdef extern from *:
    """
    #include <signal.h>
    #include <string.h>
    #include <x86intrin.h>
    static inline unsigned long long chv_ticks(void) { return __rdtsc(); }
    static void chv_kicked(int sig) { (void)sig; }
    /* A handler must exist, without SA_RESTART, so that the signal ends KVM_RUN and blocking calls. */
    static int chv_install_kick(int sig) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = chv_kicked;
        sigemptyset(&action.sa_mask);
        return sigaction(sig, &action, 0);
    }
    static int chv_unblock_kick(int sig) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, sig);
        return pthread_sigmask(SIG_UNBLOCK, &set, 0);
    }
    #define chv_atomic_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_atomic_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define chv_atomic_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    """
    uint64_t chv_ticks() nogil
    int chv_install_kick(int sig)
    int chv_unblock_kick(int sig) nogil
    uint8_t chv_atomic_load(uint8_t *p) nogil
    void chv_atomic_store(uint8_t *p, uint8_t v) nogil
    uint8_t chv_atomic_exchange(uint8_t *p, uint8_t v) nogil

cdef enum:
    UNCLAIMED_PIO_SLOT = 62
    UNCLAIMED_MMIO_SLOT = 63

# How the loop ends; the names are what VcpuRun.run returns.
cdef enum:
    OUT_KICKED = 0
    OUT_RESET = 1
    OUT_SHUTDOWN = 2
    OUT_EXCEPTION = 3
    OUT_UNHANDLED = 4
    OUT_ERRNO = 5

OUTCOMES = ("kicked", "reset", "shutdown", "exception", "unhandled", "errno")

KICK_SIGNAL = signal.SIGRTMIN
cdef int _kick_signal = KICK_SIGNAL

REASONS = {
    KVM_EXIT_UNKNOWN: "unknown", KVM_EXIT_EXCEPTION: "exception", KVM_EXIT_IO: "io",
    KVM_EXIT_HYPERCALL: "hypercall", KVM_EXIT_DEBUG: "debug", KVM_EXIT_HLT: "hlt", KVM_EXIT_MMIO: "mmio",
    KVM_EXIT_IRQ_WINDOW_OPEN: "irq-window-open", KVM_EXIT_SHUTDOWN: "shutdown",
    KVM_EXIT_FAIL_ENTRY: "fail-entry", KVM_EXIT_INTR: "intr", KVM_EXIT_INTERNAL_ERROR: "internal-error",
    KVM_EXIT_SYSTEM_EVENT: "system-event", KVM_EXIT_IOAPIC_EOI: "ioapic-eoi",
    UNCLAIMED_PIO_SLOT: "unclaimed-pio", UNCLAIMED_MMIO_SLOT: "unclaimed-mmio",
}

_first_ticks = chv_ticks()
_first_time = time.monotonic_ns()


def nanoseconds_per_tick() -> float:
    """What one tick of the statistics lasts, measured since this module was imported."""
    elapsed = time.monotonic_ns() - _first_time
    if elapsed < 10_000_000:
        time.sleep(0.01)
        elapsed = time.monotonic_ns() - _first_time
    return elapsed / (chv_ticks() - _first_ticks)


def install_kick_handler() -> None:
    """Give this process an empty handler for KICK_SIGNAL; once, before any vCPU runs."""
    if chv_install_kick(_kick_signal) != 0:
        raise OSError(errno, f"sigaction: {os.strerror(errno)}")


cdef class VcpuRun:
    """The run loop of one vCPU and what it counts.

    ``fd`` is the vCPU's descriptor, ``size`` the bytes of its shared area; ``pio`` and ``mmio`` are
    the buses that its accesses go to. One thread calls :meth:`run`; any thread may call :meth:`kick`.
    """
    cdef kvm_run *shared
    cdef size_t size
    cdef int fd
    cdef readonly Bus pio
    cdef readonly Bus mmio
    # An exit is counted once, in the table of its bus or, if it goes to none, by its reason. Not in this
    # object, which Python clears: pages of the tables that nothing is counted in take no memory.
    cdef exit_stats *stats
    cdef exit_stats *pio_stats
    cdef exit_stats *mmio_stats
    cdef uint32_t pio_hint
    cdef uint32_t mmio_hint
    cdef pthread_t thread
    cdef bint running
    cdef int error_number
    cdef PyObject *error

    def __cinit__(self, int fd, size_t size, Bus pio, Bus mmio):
        cdef void *shared
        self.error = NULL
        self.stats = <exit_stats *>calloc(3, sizeof(exit_stats))
        if self.stats is NULL:
            raise MemoryError
        self.pio_stats = self.stats + 1
        self.mmio_stats = self.stats + 2
        self.fd = fd
        self.pio = pio
        self.mmio = mmio
        # Not Python's mmap: it keeps a second descriptor of each vCPU.
        shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if shared == MAP_FAILED:
            raise KvmError(errno, f"mapping a vCPU's shared area: {os.strerror(errno)}")
        self.shared = <kvm_run *>shared
        self.size = size

    def __dealloc__(self):
        cdef int table
        if self.shared is not NULL:
            munmap(self.shared, self.size)
        if self.stats is not NULL:
            for table in range(3):
                stats_free(&self.stats[table])
            free(self.stats)
        if self.error is not NULL:
            take_error(self.error)

    def close(self) -> None:
        """Give the shared area back; the vCPU must not run any more."""
        if self.running:
            raise RuntimeError("the vCPU is running")
        if self.shared is not NULL:
            munmap(self.shared, self.size)
            self.shared = NULL

    def run(self) -> str:
        """Run the guest until something ends it; returns a name of OUTCOMES.

        "kicked" means that :meth:`kick` was called: any access under way has been completed, so the
        vCPU's state can be read. "exception": a Python handler raised; see :meth:`take_exception`.
        "unhandled": see :meth:`exit_details`. An ioctl that fails raises KvmError.
        """
        cdef int outcome
        if self.shared is NULL:
            raise RuntimeError("the vCPU is closed")
        if self.error is not NULL:  # nobody took it
            take_error(self.error)
            self.error = NULL
        self.thread = pthread_self()
        self.running = True
        try:
            with nogil:
                chv_unblock_kick(_kick_signal)
                outcome = self.loop()
        finally:
            self.running = False
        if outcome == OUT_ERRNO:
            raise KvmError(self.error_number, f"KVM_RUN: {os.strerror(self.error_number)}")
        return OUTCOMES[outcome]

    def kick(self) -> None:
        """Make :meth:`run` return "kicked", now or when it is next called, until :meth:`rearm`."""
        if self.shared is not NULL:
            # One signal until rearm: real-time signals queue, and a thread that is kicked faster than it
            # can take them would never get past its handler.
            if chv_atomic_exchange(&self.shared.immediate_exit, 1) == 0 and self.running:
                pthread_kill(self.thread, _kick_signal)

    def rearm(self) -> None:
        """Let the next :meth:`run` enter the guest."""
        if self.shared is not NULL:
            chv_atomic_store(&self.shared.immediate_exit, 0)

    def take_exception(self) -> BaseException:
        """The exception that a Python handler raised, once."""
        if self.error is NULL:
            raise RuntimeError("no handler raised")
        exception = take_error(self.error)
        self.error = NULL
        return exception

    def exit_details(self) -> dict:
        """What the last exit says: ``reason`` and the fields that it has."""
        cdef kvm_run *run = self.shared
        cdef uint32_t i
        if run is NULL:
            return {"reason": "closed"}
        details = {"reason": REASONS.get(run.exit_reason, f"reason-{run.exit_reason}")}
        if run.exit_reason == KVM_EXIT_INTERNAL_ERROR:
            details["suberror"] = run.internal.suberror
            details["data"] = [run.internal.data[i] for i in range(min(run.internal.ndata, 16))]
        elif run.exit_reason == KVM_EXIT_FAIL_ENTRY:
            details["hardware_reason"] = run.fail_entry.hardware_entry_failure_reason
        elif run.exit_reason == KVM_EXIT_UNKNOWN:
            details["hardware_reason"] = run.hw.hardware_exit_reason
        elif run.exit_reason == KVM_EXIT_EXCEPTION:
            details["vector"] = run.ex.exception
            details["error_code"] = run.ex.error_code
        elif run.exit_reason == KVM_EXIT_SYSTEM_EVENT:
            details["type"] = run.system_event.type
        return details

    def statistics(self) -> dict:
        """slot -> (reads, writes, ticks, max_ticks, {bucket: count}); may be read while the guest runs."""
        result = stats_snapshot(self.stats)
        for reason, counted in (KVM_EXIT_IO, stats_snapshot(self.pio_stats)), \
                               (KVM_EXIT_MMIO, stats_snapshot(self.mmio_stats)):
            for slot, entry in counted.items():
                _add(result, slot, entry)
                # Reasons do not tell reads from writes.
                _add(result, reason, (entry[0] + entry[1], 0, *entry[2:]))
        return result

    cdef int loop(self) noexcept nogil:
        cdef kvm_run *run = self.shared
        cdef int result
        cdef uint64_t start
        cdef uint32_t reason, slot
        cdef exit_stats *stats
        cdef bint is_write
        while True:
            if ioctl(self.fd, KVM_RUN, 0) < 0:
                if errno == EINTR or errno == EAGAIN:
                    # EAGAIN: an application processor that waits for INIT was woken.
                    if chv_atomic_load(&run.immediate_exit):
                        return OUT_KICKED
                    continue
                self.error_number = errno
                return OUT_ERRNO
            start = chv_ticks()
            reason = run.exit_reason
            slot = reason if reason < UNCLAIMED_PIO_SLOT else 0
            stats = self.stats
            is_write = False
            if reason == KVM_EXIT_IO:
                stats = self.pio_stats
                is_write = run.io.direction == KVM_EXIT_IO_OUT
                result = self.handle_io(run, is_write, &slot)
            elif reason == KVM_EXIT_MMIO:
                stats = self.mmio_stats
                is_write = run.mmio.is_write
                result = self.handle_mmio(run, is_write, &slot)
            elif reason == KVM_EXIT_SYSTEM_EVENT and run.system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN:
                result = BUS_SHUTDOWN
            elif reason == KVM_EXIT_SYSTEM_EVENT and run.system_event.type == KVM_SYSTEM_EVENT_RESET:
                result = BUS_RESET
            elif reason == KVM_EXIT_INTR or reason == KVM_EXIT_IRQ_WINDOW_OPEN or reason == KVM_EXIT_IOAPIC_EOI:
                result = BUS_OK
            else:
                result = -1
            stats_record(stats, slot, is_write, chv_ticks() - start)
            if result == BUS_OK:
                continue
            if result == BUS_RESET:
                return OUT_RESET
            if result == BUS_SHUTDOWN:
                return OUT_SHUTDOWN
            if result == BUS_EXCEPTION:
                return OUT_EXCEPTION
            return OUT_UNHANDLED

    cdef int handle_io(self, kvm_run *run, bint is_write, uint32_t *slot) noexcept nogil:
        cdef uint32_t size = run.io.size
        cdef uint32_t count = run.io.count
        cdef uint64_t port = run.io.port
        cdef uint8_t *data = <uint8_t *>run + run.io.data_offset
        cdef uint64_t offset = 0
        cdef bus_range *entry = self.pio.find(port, size, &self.pio_hint, &offset)
        if entry is NULL:
            if not is_write:
                memset(data, 0xFF, size * count)
            slot[0] = UNCLAIMED_PIO_SLOT
            return BUS_OK
        slot[0] = entry.slot
        # A string instruction brings many elements in one exit; each is an access of its own.
        return bus_access_many(entry, offset, size, count, data, is_write, &self.error)

    cdef int handle_mmio(self, kvm_run *run, bint is_write, uint32_t *slot) noexcept nogil:
        cdef uint64_t address = run.mmio.phys_addr
        cdef uint32_t length = run.mmio.len
        cdef uint8_t *data = run.mmio.data
        cdef bus_range *entry
        cdef uint32_t piece
        cdef uint64_t offset = 0
        cdef int result = BUS_OK
        entry = self.mmio.find(address, length, &self.mmio_hint, &offset)
        if entry is NULL:
            if not is_write:
                memset(data, 0xFF, length)
            slot[0] = UNCLAIMED_MMIO_SLOT
            return BUS_OK
        slot[0] = entry.slot
        # An access that crosses a page comes in parts of any length; devices see 8, 4, 2 or 1 bytes.
        while length and result == BUS_OK:
            piece = 8 if length >= 8 else 4 if length >= 4 else 2 if length >= 2 else 1
            result = bus_access(entry, offset, piece, data, is_write, &self.error)
            offset += piece
            data += piece
            length -= piece
        return result


def _add(statistics: dict, slot: int, entry: tuple) -> None:
    """Add one slot's counts to what ``statistics`` has of that slot."""
    reads, writes, ticks, most, histogram = statistics.get(slot, (0, 0, 0, 0, {}))
    histogram = dict(histogram)
    for bucket, count in entry[4].items():
        histogram[bucket] = histogram.get(bucket, 0) + count
    statistics[slot] = (reads + entry[0], writes + entry[1], ticks + entry[2], max(most, entry[3]), histogram)
