"""A 16550A serial port.

Registers as in the PC16550D data sheet (National Semiconductor, 1995). Register accesses and the loops
that move bytes to and from the host run without the GIL, under the lock of the port.

Three things differ from a chip, because the line has no baud rate:

- A byte written to THR is sent at once, into a ring that :meth:`Serial.run_writer` empties. While the
  ring has no room for 16 bytes (a FIFO's worth, which a driver may write in one go), THRE and TEMT are
  clear and the guest waits.
- Bytes from the host wait, in a second ring and then at their source, until the guest has emptied its
  FIFO. So the host never causes an overrun.
- Received bytes below the trigger level are indicated at once, as a character timeout. Between one
  FIFO and the next the line rests as long as the guest took to read the last one.

The interrupt is edge-triggered: one pulse whenever an enabled cause becomes active.
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, EIO, EPIPE, ECONNRESET, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec
from posix.unistd cimport close, read, write

import os

from .._bus cimport BUS_OK, CDevice
from ._terminal cimport chv_guard, chv_unguard
from ._uart cimport *

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_condattr_destroy(pthread_condattr_t *)
    int pthread_cond_init(pthread_cond_t *, const pthread_condattr_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)
    int pthread_cond_destroy(pthread_cond_t *)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    enum:
        POLLIN
        POLLOUT
        POLLERR
        POLLHUP
        POLLNVAL

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *data, size_t size, int flags)
    ssize_t send(int fd, const void *data, size_t size, int flags)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL

cdef extern from *:
    """
    #include <sys/ioctl.h>
    #include <sys/stat.h>
    #include <termios.h>
    #include <unistd.h>
    static int chv_is_socket(int fd) {
        struct stat st;
        return fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
    }
    static int chv_is_pty_master(int fd) {
        unsigned int number;
        return ioctl(fd, TIOCGPTN, &number) == 0;
    }
    /* A process in the background gets EIO (or SIGTTIN) instead of what is typed. */
    static int chv_in_background(int fd) {
        pid_t group = tcgetpgrp(fd);
        return group > 0 && group != getpgrp();
    }
    """
    bint chv_is_socket(int fd) nogil
    bint chv_is_pty_master(int fd) nogil
    bint chv_in_background(int fd) nogil

cdef enum:
    CHUNK = 4096
    NAP_MS = 100        # how often a pty is looked at while nobody has it open
    REST_MIN_NS = 20000
    REST_MAX_NS = 2000000
    REST_SENDING = 4    # so many times as long while the guest has something to send
    GATHER_NS = 1000000
    GATHER_STEPS = 4    # so long, or until there are
    GATHER_ENOUGH = 64  # bytes

cpdef enum:
    STOPPED = 0         # stop() was called
    ENDED = 1           # the other side is gone, or the input has ended
    WATCHED = 2         # the watched descriptor became readable
    FAILED = 3          # an error; see Serial.error and Serial.input_error


# A wider access is one byte after the other at consecutive ports, as on the ISA bus.

cdef int serial_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    cdef uart *u = <uart *>ctx
    cdef uint32_t i
    pthread_mutex_lock(&u.lock)
    for i in range(size):
        data[i] = read_register(u, (offset + i) & 7)
    update_irq(u)
    pthread_mutex_unlock(&u.lock)
    return BUS_OK


cdef int serial_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef uart *u = <uart *>ctx
    cdef uint32_t i
    pthread_mutex_lock(&u.lock)
    for i in range(size):
        write_register(u, (offset + i) & 7, data[i])
    update_irq(u)
    pthread_mutex_unlock(&u.lock)
    return BUS_OK


# -- the host's side -------------------------------------------------------------------

cdef void set_lossy(uart *u, bint lossy) noexcept nogil:
    if u.lossy == lossy:
        return
    pthread_mutex_lock(&u.lock)
    u.lossy = lossy
    output_take(u, 0)
    pthread_mutex_unlock(&u.lock)


cdef int output_failed(uart *u, int error) noexcept nogil:
    """Nothing can be written any more: let the guest go on without."""
    pthread_mutex_lock(&u.lock)
    u.error = error
    u.write_errors += 1
    u.discard = 1
    u.dropped += u.output_put - u.output_taken
    output_take(u, u.output_put)
    pthread_mutex_unlock(&u.lock)
    return FAILED


cdef void clear_wake(int fd) noexcept nogil:
    cdef uint64_t count
    read(fd, &count, 8)


cdef void nap(int wake_fd) noexcept nogil:
    cdef pollfd fds
    fds.fd = wake_fd
    fds.events = POLLIN
    poll(&fds, 1, NAP_MS)


cdef void gather(uart *u) noexcept nogil:
    """Let a burst become long: otherwise each byte of a slow guest would wake the writer and whoever reads."""
    cdef timespec pause
    cdef int i
    pause.tv_sec = 0
    pause.tv_nsec = GATHER_NS
    for i in range(GATHER_STEPS):
        nanosleep(&pause, NULL)
        if u.stopping or u.output_put - u.output_taken >= GATHER_ENOUGH:
            return


cdef int writer_loop(uart *u, int fd, bint reconnects) noexcept nogil:
    cdef uint8_t chunk[CHUNK]
    cdef pollfd fds[2]
    cdef uint64_t start
    cdef size_t size
    cdef ssize_t written
    cdef bint socket = chv_is_socket(fd)
    cdef bint pty = chv_is_pty_master(fd)
    fds[0].fd = u.wake_writer
    fds[0].events = POLLIN
    fds[1].fd = fd
    if not pty:
        set_lossy(u, 0)
    while True:
        pthread_mutex_lock(&u.lock)
        start = u.output_taken
        size = output_peek(u, chunk, CHUNK)
        u.writer_idle = size == 0
        if u.stopping:
            pthread_mutex_unlock(&u.lock)
            return STOPPED
        pthread_mutex_unlock(&u.lock)
        fds[1].events = POLLOUT if size else 0
        fds[0].revents = fds[1].revents = 0
        if poll(fds, 2, -1) < 0:
            if errno == EINTR or errno == EAGAIN:
                continue
            return output_failed(u, errno)
        if fds[0].revents:
            clear_wake(u.wake_writer)
            if size == 0:
                gather(u)
        if pty:
            set_lossy(u, (fds[1].revents & POLLHUP) != 0)
            if fds[1].revents & POLLHUP:
                nap(u.wake_writer)
                continue
        elif fds[1].revents & (POLLERR | POLLHUP | POLLNVAL) and size == 0:
            if reconnects:
                set_lossy(u, 1)
                return ENDED
            return output_failed(u, EPIPE)
        if size == 0 or fds[1].revents == 0:
            continue
        written = send(fd, chunk, size, MSG_DONTWAIT | MSG_NOSIGNAL) if socket else write(fd, chunk, size)
        if written < 0:
            if errno == EAGAIN or errno == EINTR or (pty and errno == EIO):
                continue
            if reconnects:
                set_lossy(u, 1)
                return ENDED
            return output_failed(u, errno)
        pthread_mutex_lock(&u.lock)
        output_take(u, start + written)
        pthread_mutex_unlock(&u.lock)


cdef void end_rest(uart *u) noexcept nogil:
    """Let the line rest (see rest() in _uart.pxd), then go on. It ends early if the guest has sent all it had."""
    cdef timespec pause
    cdef bint over = False
    cdef int i = 0
    pause.tv_sec = 0
    pause.tv_nsec = min(max(u.drain_ns, REST_MIN_NS), REST_MAX_NS)
    while not over:
        nanosleep(&pause, NULL)
        i += 1
        pthread_mutex_lock(&u.lock)
        over = i == REST_SENDING or not u.ier & IER_THRE or u.stopping
        if over:
            u.resting = 0
            refill(u)
            update_irq(u)
        pthread_mutex_unlock(&u.lock)


cdef int wait_woken(uart *u, pollfd *fds, int count) noexcept nogil:
    """Poll ``fds``, of which the first is wake_reader; how many of the others are ready, or -1."""
    cdef int ready, i
    for i in range(count):
        fds[i].revents = 0
    ready = poll(fds, count, -1)
    if ready < 0:
        return 0 if errno == EINTR or errno == EAGAIN else -1
    if fds[0].revents:
        clear_wake(u.wake_reader)
        ready -= 1
        if u.resting:
            end_rest(u)
    return ready


cdef int deliver(uart *u, const uint8_t *data, size_t size, int watch_fd) noexcept nogil:
    """Put all of ``data`` into the input ring, waiting for room; ENDED unless something else came first."""
    cdef pollfd fds[2]
    cdef size_t done = 0
    fds[0].fd = u.wake_reader
    fds[1].fd = watch_fd
    fds[0].events = fds[1].events = POLLIN
    while True:
        pthread_mutex_lock(&u.lock)
        done += input_put(u, data + done, size - done)
        u.reader_waiting = done < size
        if u.stopping:
            pthread_mutex_unlock(&u.lock)
            return STOPPED
        pthread_mutex_unlock(&u.lock)
        if done == size:
            return ENDED
        if wait_woken(u, fds, 2) > 0:
            return WATCHED


cdef int reader_loop(uart *u, int fd, int watch_fd) noexcept nogil:
    cdef uint8_t chunk[CHUNK]
    cdef pollfd fds[3]
    cdef ssize_t count
    cdef int ready, outcome
    cdef bint socket = fd >= 0 and chv_is_socket(fd)
    cdef bint pty = fd >= 0 and chv_is_pty_master(fd)
    fds[0].fd = u.wake_reader
    fds[1].fd = fd
    fds[2].fd = watch_fd
    fds[0].events = fds[1].events = fds[2].events = POLLIN
    while not u.stopping:
        ready = wait_woken(u, fds, 3)
        if ready < 0:
            u.input_error = errno
            return FAILED
        if ready == 0:
            continue
        if fds[2].revents:
            return WATCHED
        if not fds[1].revents & POLLIN:
            if not pty:
                return ENDED
            nap(u.wake_reader)   # nobody has it open, and nothing tells when somebody will
            continue
        count = recv(fd, chunk, CHUNK, MSG_DONTWAIT) if socket else read(fd, chunk, CHUNK)
        if count > 0:
            outcome = deliver(u, chunk, count, watch_fd)
            if outcome != ENDED:
                return outcome
        elif count == 0:
            if not socket:
                return ENDED
            fds[1].events = 0   # the peer may still read: wait until it is gone altogether
        elif errno == EIO and (pty or chv_in_background(fd)):
            nap(u.wake_reader)
        elif errno == EIO or errno == ECONNRESET:
            return ENDED
        elif errno != EAGAIN and errno != EINTR:
            u.input_error = errno
            return FAILED
    return STOPPED


def guard_terminal(fd: int) -> None:
    """Remember the settings of terminal ``fd`` and restore them if a signal kills the process.

    Signals that have a handler already are left to it. One terminal at a time.
    """
    if chv_guard(fd) < 0:
        raise os_error(errno)


def unguard_terminal() -> None:
    """Undo :func:`guard_terminal`: the signals have their default action again."""
    chv_unguard()


cdef object os_error(int error):
    return OSError(error, os.strerror(error)) if error else None


cdef class Serial(CDevice):
    """A 16550A whose interrupt is a write to the eventfd ``irq_fd`` (-1: none)."""

    def __cinit__(self, int irq_fd):
        cdef pthread_condattr_t attributes
        self.u.wake_reader = self.u.wake_writer = -1
        pthread_mutex_init(&self.u.lock, NULL)
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(&self.u.progress, &attributes)
        pthread_condattr_destroy(&attributes)
        self.u.irq_fd = irq_fd
        self.u.wake_reader = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.u.wake_writer = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.u.wake_reader < 0 or self.u.wake_writer < 0:
            raise os_error(errno)
        reset_registers(&self.u)
        self.ops.read = serial_read
        self.ops.write = serial_write
        self.ops.ctx = &self.u

    def __dealloc__(self):
        if self.u.wake_reader >= 0:
            close(self.u.wake_reader)
        if self.u.wake_writer >= 0:
            close(self.u.wake_writer)
        pthread_cond_destroy(&self.u.progress)
        pthread_mutex_destroy(&self.u.lock)

    # -- for the threads that do the I/O

    def run_writer(self, out_fd: int, reconnects: bool = False) -> int:
        """Write the guest's output to ``out_fd`` until :meth:`stop`; blocks, without the GIL.

        Returns STOPPED; or FAILED after an error, which is in :attr:`error`: from then on output is
        dropped and the guest goes on. With ``reconnects``, a reader that went away is no error: ENDED is
        returned, and until the next call the ring keeps the newest output, as it does while nobody has a
        pty open. ``out_fd`` is polled first, and written in pieces of at most 4096 bytes; if other
        processes share it, it may block all the same unless it is non-blocking or a socket.
        """
        cdef int fd = out_fd
        cdef bint keep = reconnects
        cdef int result
        with nogil:
            result = writer_loop(&self.u, fd, keep)
        return result

    def run_reader(self, in_fd: int, watch_fd: int = -1) -> int:
        """Give the guest what ``in_fd`` (-1: nothing) has to read until :meth:`stop`; blocks, without the GIL.

        While this runs, the line rests between one FIFO and the next, as one with a baud rate does.

        Returns STOPPED, ENDED at the end of the input (for a pty there is none), WATCHED when
        ``watch_fd`` is readable, or FAILED with the reason in :attr:`input_error`.
        """
        cdef int fd = in_fd, watch = watch_fd
        cdef int result
        with nogil:
            self.u.reader_running = 1
            result = reader_loop(&self.u, fd, watch)
            pthread_mutex_lock(&self.u.lock)
            self.u.reader_running = self.u.resting = 0
            refill(&self.u)
            update_irq(&self.u)
            pthread_mutex_unlock(&self.u.lock)
        return result

    def stop(self) -> None:
        """End :meth:`run_writer` and :meth:`run_reader`, now and for good. Output that waits stays."""
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            self.u.stopping = 1
            pthread_cond_broadcast(&self.u.progress)
            pthread_mutex_unlock(&self.u.lock)
            signal_fd(self.u.wake_reader)
            signal_fd(self.u.wake_writer)

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the output written so far has been handed over.

        True if it was. Does not wait where that cannot happen: nobody has the pty open, or writing failed.
        """
        cdef timespec limit, step
        cdef uint64_t target
        cdef bint waiting = True
        cdef int64_t left = <int64_t>(max(0.0, timeout) * 1e9)
        clock_gettime(CLOCK_MONOTONIC, &limit)
        add_ns(&limit, left)
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            target = self.u.output_put
            pthread_mutex_unlock(&self.u.lock)
        while waiting:
            clock_gettime(CLOCK_MONOTONIC, &step)
            if not earlier(&step, &limit):
                break
            add_ns(&step, 100000000)   # so often signals are looked at
            if earlier(&limit, &step):
                step = limit
            with nogil:
                pthread_mutex_lock(&self.u.lock)
                waiting = flushing(&self.u, target)
                if waiting:
                    pthread_cond_timedwait(&self.u.progress, &self.u.lock, &step)
                    waiting = flushing(&self.u, target)
                pthread_mutex_unlock(&self.u.lock)
            PyErr_CheckSignals()
        return self.u.output_taken >= target and not self.u.discard

    @property
    def attached(self) -> bool:
        """Whether somebody takes the output. If not, the ring keeps the newest and the guest never waits."""
        return not self.u.lossy

    @attached.setter
    def attached(self, bint value):
        set_lossy(&self.u, not value)

    @property
    def discard(self) -> bool:
        """Whether output is thrown away."""
        return bool(self.u.discard)

    @discard.setter
    def discard(self, bint value):
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            self.u.discard = value
            output_take(&self.u, self.u.output_put if value else 0)
            pthread_mutex_unlock(&self.u.lock)

    # -- for tests and programs

    def inject(self, data: bytes) -> int:
        """Receive ``data`` as if it came from the host; returns how many bytes fitted."""
        cdef const uint8_t[::1] view = data
        cdef size_t size = view.shape[0]
        cdef const uint8_t *bytes_ = &view[0] if size else NULL
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            size = input_put(&self.u, bytes_, size)
            pthread_mutex_unlock(&self.u.lock)
        return size

    def send_break(self) -> None:
        """Let the guest receive a break, ahead of input that waits (Linux: the first half of a SysRq)."""
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            self.u.break_waiting = 1
            refill(&self.u)
            update_irq(&self.u)
            pthread_mutex_unlock(&self.u.lock)

    def drain(self, max: int = OUTPUT_SIZE) -> bytes:
        """Take at most ``max`` bytes of output that waits. Not while :meth:`run_writer` runs."""
        cdef size_t size = min(max, OUTPUT_SIZE)
        data = bytearray(size)
        cdef uint8_t[::1] view = data
        if size == 0:
            return b""
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            size = output_peek(&self.u, &view[0], size)
            output_take(&self.u, self.u.output_taken + size)
            pthread_mutex_unlock(&self.u.lock)
        return bytes(data[:size])

    @property
    def pending_output(self) -> int:
        """How many bytes wait to be written."""
        return self.u.output_put - self.u.output_taken

    @property
    def pending_input(self) -> int:
        """How many bytes wait for the guest, besides those in its FIFO."""
        return self.u.input_put - self.u.input_taken

    @property
    def error(self):
        """The OSError of the write that failed, or None."""
        return os_error(self.u.error)

    @property
    def input_error(self):
        """The OSError of the read that failed, or None."""
        return os_error(self.u.input_error)

    @property
    def counters(self) -> dict:
        """``overruns``: bytes that the guest wrote although THRE was clear and the ring was full.
        ``dropped``: bytes that nobody took. ``write_errors``, ``interrupts``: how many.
        ``sent``, ``received``: bytes taken over from and handed to the guest.
        """
        return {"overruns": self.u.overruns, "dropped": self.u.dropped, "write_errors": self.u.write_errors,
                "interrupts": self.u.interrupts, "sent": self.u.output_put, "received": self.u.input_taken}

    @property
    def overruns(self) -> int:
        return self.u.overruns

    # -- life of the VM

    def set_irq_fd(self, irq_fd: int) -> None:
        """Interrupt through another eventfd from now on."""
        cdef int fd = irq_fd
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            self.u.irq_fd = fd
            pthread_mutex_unlock(&self.u.lock)

    def reset(self) -> None:
        """Power-on state of the registers and the FIFO. Threads go on, and both rings keep what they hold."""
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            reset_registers(&self.u)
            pthread_mutex_unlock(&self.u.lock)

    def save(self) -> dict:
        """Registers, FIFO and the input that waits. Output that waits is the host's; :meth:`flush` first."""
        cdef uart copy
        with nogil:
            pthread_mutex_lock(&self.u.lock)
            copy = self.u
            pthread_mutex_unlock(&self.u.lock)
        slots = [(copy.fifo_first + i) % FIFO_SIZE for i in range(copy.fifo_count)]
        waiting = copy.input_put - copy.input_taken
        start = copy.input_taken
        state = {name: value for name, value in registers(&copy).items()}
        state["fifo"] = bytes([copy.fifo[slot] for slot in slots])
        state["fifo_flags"] = bytes([copy.fifo_flags[slot] for slot in slots])
        state["input"] = bytes([copy.input[(start + i) % INPUT_SIZE] for i in range(waiting)])
        return state

    def load(self, state: dict) -> None:
        """Take over a saved state; an active cause interrupts again."""
        fifo, flags, waiting = state["fifo"], state["fifo_flags"], state["input"]
        if len(fifo) > FIFO_SIZE or len(flags) != len(fifo) or len(waiting) > INPUT_SIZE:
            raise ValueError("serial: the saved FIFO or input is longer than the port's")
        pthread_mutex_lock(&self.u.lock)
        try:
            set_registers(&self.u, state)
            clear_receiver(&self.u)
            for i in range(len(fifo)):
                fifo_put(&self.u, fifo[i], flags[i])
            self.u.input_taken = 0
            self.u.input_put = len(waiting)
            for i in range(len(waiting)):
                self.u.input[<size_t>i] = waiting[i]
            self.u.active = 0
            update_irq(&self.u)
        finally:
            pthread_mutex_unlock(&self.u.lock)


cdef bint flushing(uart *u, uint64_t target) noexcept nogil:
    return u.output_taken < target and not (u.discard or u.lossy or u.stopping)


cdef void add_ns(timespec *t, int64_t ns) noexcept nogil:
    cdef int64_t total = t.tv_nsec + ns
    t.tv_sec += total // 1000000000
    t.tv_nsec = total % 1000000000


cdef bint earlier(const timespec *a, const timespec *b) noexcept nogil:
    return a.tv_sec < b.tv_sec or (a.tv_sec == b.tv_sec and a.tv_nsec < b.tv_nsec)


cdef dict registers(uart *u):
    return {"ier": u.ier, "fcr": u.fcr, "lcr": u.lcr, "mcr": u.mcr, "msr": u.msr, "scr": u.scr, "dll": u.dll,
            "dlm": u.dlm, "overrun": u.overrun, "thre_pending": u.thre_pending, "break_waiting": u.break_waiting}


cdef set_registers(uart *u, dict state):
    u.ier = state["ier"] & IER_BITS
    u.fcr = state["fcr"] & (FCR_ENABLE | FCR_TRIGGER)
    u.lcr, u.mcr, u.msr = state["lcr"], state["mcr"] & MCR_BITS, state["msr"]
    u.scr, u.dll, u.dlm = state["scr"], state["dll"], state["dlm"]
    u.overrun, u.thre_pending = state["overrun"], state["thre_pending"]
    u.break_waiting = state["break_waiting"]
    u.thre = 1
    update_thre(u)
