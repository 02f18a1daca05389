"""The chip: a 16550A's registers and the two rings behind its line.

Pure state in, state out. What is here runs with the lock held, without the GIL, on any thread; the only
thing it does to the outside is to signal eventfds and look at the clock. Registers as in the PC16550D data sheet (National
Semiconductor, 1995).
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport write

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_broadcast(pthread_cond_t *)

cdef enum:
    FIFO_SIZE = 16
    INPUT_SIZE = 16384     # host bytes that wait for the guest
    OUTPUT_SIZE = 131072   # guest bytes that wait for the host; both are powers of two

cdef struct uart:
    pthread_mutex_t lock
    pthread_cond_t progress   # output went out, or will not go out
    int irq_fd
    # Registers (PC16550D data sheet, table 2)
    uint8_t ier
    uint8_t fcr
    uint8_t lcr
    uint8_t mcr
    uint8_t msr
    uint8_t scr
    uint8_t dll
    uint8_t dlm
    uint8_t overrun           # LSR bit 1
    uint8_t thre              # LSR bits 5 and 6: the output ring has room for a FIFO's worth
    uint8_t thre_pending      # the interrupt of THRE, until IIR is read or THR is written
    uint8_t active            # causes that the interrupt line shows
    uint8_t looked            # IIR or LSR was read since the last pulse
    uint8_t break_waiting
    uint8_t fifo_first
    uint8_t fifo_count
    uint8_t fifo[FIFO_SIZE]
    uint8_t fifo_flags[FIFO_SIZE]   # LSR bits that belong to the character
    # The host's side
    int wake_reader
    int wake_writer
    uint8_t reader_running    # it ends the line's rests
    uint8_t reader_waiting    # for room in input
    uint8_t resting           # input waits although the FIFO is empty
    int64_t filled_at         # CLOCK_MONOTONIC in ns
    int64_t drain_ns          # how long the guest took to empty the FIFO
    uint8_t writer_idle       # for something in output
    uint8_t stopping
    uint8_t discard           # output goes nowhere
    uint8_t lossy             # nobody reads: keep the newest output only
    int error                 # errno of the write that failed
    int input_error
    uint64_t write_errors
    uint64_t overruns
    uint64_t dropped
    uint64_t interrupts
    uint64_t input_put
    uint64_t input_taken
    uint64_t output_put
    uint64_t output_taken
    uint8_t input[INPUT_SIZE]
    uint8_t output[OUTPUT_SIZE]

cdef enum:
    # register offsets
    DATA = 0            # RBR, THR; DLL while LCR_DLAB is set
    IER = 1             # DLM while LCR_DLAB is set
    IIR = 2             # FCR when written
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7

    IER_RECEIVED = 0x01
    IER_THRE = 0x02
    IER_LINE = 0x04
    IER_MODEM = 0x08
    IER_BITS = 0x0F

    IIR_NONE = 0x01
    IIR_THRE = 0x02
    IIR_RECEIVED = 0x04
    IIR_LINE = 0x06
    IIR_TIMEOUT = 0x0C
    IIR_MODEM = 0x00
    IIR_FIFO = 0xC0

    FCR_ENABLE = 0x01
    FCR_CLEAR_RECEIVER = 0x02
    FCR_TRIGGER = 0xC0

    LCR_BREAK = 0x40
    LCR_DLAB = 0x80

    MCR_DTR = 0x01
    MCR_RTS = 0x02
    MCR_OUT1 = 0x04
    MCR_OUT2 = 0x08     # on a PC: lets the interrupt through
    MCR_LOOP = 0x10
    MCR_BITS = 0x1F

    LSR_DR = 0x01
    LSR_OE = 0x02
    LSR_BI = 0x10
    LSR_THRE = 0x20
    LSR_TEMT = 0x40
    LSR_FIFO_ERROR = 0x80

    MSR_DELTAS = 0x0F
    MSR_TERI = 0x04
    MSR_CTS = 0x10
    MSR_DSR = 0x20
    MSR_RI = 0x40
    MSR_DCD = 0x80
    MSR_CONNECTED = 0xB0   # DCD, DSR and CTS: the host is always there


# -- interrupts ------------------------------------------------------------------------

cdef inline void signal_fd(int fd) noexcept nogil:
    cdef uint64_t one = 1
    if fd >= 0:
        write(fd, &one, 8)   # EAGAIN: already signalled as often as it can be


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef inline uint8_t line_status(uart *u) noexcept nogil:
    """The LSR bits that cause a line status interrupt."""
    cdef uint8_t status = LSR_OE if u.overrun else 0
    if u.fifo_count:
        status |= u.fifo_flags[u.fifo_first]
    return status


cdef inline uint8_t causes(uart *u) noexcept nogil:
    """The enabled causes that are active, as the IER bits that enable them."""
    cdef uint8_t found = 0
    if line_status(u):
        found |= IER_LINE
    if u.fifo_count:
        found |= IER_RECEIVED
    if u.thre_pending:
        found |= IER_THRE
    if u.msr & MSR_DELTAS:
        found |= IER_MODEM
    return found & u.ier


cdef inline void update_irq(uart *u) noexcept nogil:
    cdef uint8_t shown = 0
    if u.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2:
        shown = causes(u)
    if shown & ~u.active:
        u.looked = 0
        u.interrupts += 1
        signal_fd(u.irq_fd)
    u.active = shown


# -- receiving -------------------------------------------------------------------------

cdef inline bint fifo_on(uart *u) noexcept nogil:
    return u.fcr & FCR_ENABLE


cdef inline uint8_t fifo_depth(uart *u) noexcept nogil:
    return FIFO_SIZE if fifo_on(u) else 1


cdef inline uint8_t trigger_level(uart *u) noexcept nogil:
    cdef uint8_t setting = u.fcr & FCR_TRIGGER
    if not fifo_on(u) or setting == 0x00:
        return 1
    return 4 if setting == 0x40 else 8 if setting == 0x80 else 14


cdef inline void fifo_put(uart *u, uint8_t byte, uint8_t flags) noexcept nogil:
    cdef uint8_t slot = (u.fifo_first + u.fifo_count) % FIFO_SIZE
    u.fifo[slot] = byte
    u.fifo_flags[slot] = flags
    u.fifo_count += 1


cdef inline void refill(uart *u) noexcept nogil:
    """Move what waits in the host's ring into the guest's FIFO, as far as there is room."""
    cdef bint was_empty = u.fifo_count == 0
    if u.mcr & MCR_LOOP or u.resting:
        return   # the line is cut off, or quiet
    if u.break_waiting and u.fifo_count < fifo_depth(u):
        u.break_waiting = 0
        fifo_put(u, 0, LSR_BI)
    while u.fifo_count < fifo_depth(u) and u.input_taken != u.input_put:
        fifo_put(u, u.input[u.input_taken % INPUT_SIZE], 0)
        u.input_taken += 1
    if was_empty and u.fifo_count:
        # The guest may have stopped reading although DR was set all the time (a driver that gives up
        # after so many bytes). On a line with a baud rate it would have seen the FIFO empty, then
        # an interrupt; so it gets one here.
        u.active &= ~IER_RECEIVED
        if u.input_taken != u.input_put:
            u.filled_at = now_ns()
    if u.reader_waiting and u.input_put - u.input_taken <= INPUT_SIZE // 2:
        u.reader_waiting = 0
        signal_fd(u.wake_reader)


cdef inline void rest(uart *u) noexcept nogil:
    """The guest has emptied its FIFO and more waits: have the reader thread fill it again in a while.

    A line with a baud rate gives a driver time between one FIFO and the next. Without it, an interrupt
    handler that reads until nothing is left stays in there, and what it has read is not processed: Linux
    then discards echoes, and input in the end. So the line rests as long as the guest took to read, and
    somewhat longer while it has something to send.
    """
    if u.reader_running and fifo_on(u) and not u.mcr & MCR_LOOP and u.input_taken != u.input_put:
        u.resting = 1
        u.drain_ns = now_ns() - u.filled_at
        signal_fd(u.wake_reader)


cdef inline uint8_t receive(uart *u) noexcept nogil:
    cdef uint8_t byte
    if u.fifo_count == 0:
        return 0
    byte = u.fifo[u.fifo_first]
    u.fifo_first = (u.fifo_first + 1) % FIFO_SIZE
    u.fifo_count -= 1
    if u.fifo_count == 0:
        rest(u)
        refill(u)
    return byte


cdef inline void receive_loopback(uart *u, uint8_t byte, uint8_t flags) noexcept nogil:
    """A character that the port sends to itself; here, and only here, the guest can overrun its FIFO."""
    if u.fifo_count == fifo_depth(u):
        u.overrun = 1
        if fifo_on(u):
            return   # the FIFO keeps the older characters, RBR alone the newest
        u.fifo_count = 0
    fifo_put(u, byte, flags)


cdef inline void clear_receiver(uart *u) noexcept nogil:
    u.fifo_first = 0
    u.fifo_count = 0
    u.active &= ~IER_RECEIVED


# -- sending ---------------------------------------------------------------------------

cdef inline void update_thre(uart *u) noexcept nogil:
    """Show THRE while the ring takes another FIFO's worth; becoming empty is an interrupt's cause."""
    cdef bint empty = (u.mcr & MCR_LOOP or u.lossy or u.discard
                       or OUTPUT_SIZE - (u.output_put - u.output_taken) >= FIFO_SIZE)
    if empty and not u.thre:
        u.thre_pending = 1
    elif not empty:
        u.thre_pending = 0
    u.thre = empty


cdef inline void output_put(uart *u, uint8_t byte) noexcept nogil:
    if u.discard:
        u.dropped += 1
        return
    if u.output_put - u.output_taken == OUTPUT_SIZE:
        if not u.lossy:
            u.overruns += 1   # written although THRE was clear
            return
        u.output_taken += 1
        u.dropped += 1
    u.output[u.output_put % OUTPUT_SIZE] = byte
    u.output_put += 1
    if u.writer_idle:
        u.writer_idle = 0
        signal_fd(u.wake_writer)


cdef inline void transmit(uart *u, uint8_t byte) noexcept nogil:
    if u.mcr & MCR_LOOP:
        receive_loopback(u, byte, 0)
    else:
        output_put(u, byte)
    # THR was full for no time at all: its interrupt went away and came back. A driver that writes a
    # FIFO's worth in one go needs to be told of that once.
    u.thre = 0
    u.thre_pending = 0
    if u.looked or not fifo_on(u):
        u.active &= ~IER_THRE
    update_thre(u)


# -- registers -------------------------------------------------------------------------

cdef inline uint8_t read_iir(uart *u) noexcept nogil:
    """The active cause of highest priority (data sheet, table 5); reading THRE's takes it away."""
    cdef uint8_t found = causes(u)
    cdef uint8_t value = IIR_NONE
    u.looked = 1
    if found & IER_LINE:
        value = IIR_LINE
    elif found & IER_RECEIVED:
        value = IIR_RECEIVED if u.fifo_count >= trigger_level(u) else IIR_TIMEOUT
    elif found & IER_THRE:
        value = IIR_THRE
        u.thre_pending = 0
    elif found & IER_MODEM:
        value = IIR_MODEM
    return value | (IIR_FIFO if fifo_on(u) else 0)


cdef inline uint8_t read_lsr(uart *u) noexcept nogil:
    cdef uint8_t value = line_status(u)
    cdef uint8_t i
    u.looked = 1
    if u.fifo_count:
        value |= LSR_DR
    if u.thre:
        value |= LSR_THRE | LSR_TEMT
    if fifo_on(u):
        for i in range(u.fifo_count):
            if u.fifo_flags[(u.fifo_first + i) % FIFO_SIZE]:
                value |= LSR_FIFO_ERROR
    u.overrun = 0
    u.fifo_flags[u.fifo_first] = 0
    return value


cdef inline uint8_t read_msr(uart *u) noexcept nogil:
    cdef uint8_t value = u.msr
    u.msr &= ~MSR_DELTAS
    return value


cdef inline uint8_t read_register(uart *u, uint64_t offset) noexcept nogil:
    cdef bint dlab = u.lcr & LCR_DLAB
    if offset == DATA:
        return u.dll if dlab else receive(u)
    if offset == IER:
        return u.dlm if dlab else u.ier
    if offset == IIR:
        return read_iir(u)
    if offset == LCR:
        return u.lcr
    if offset == MCR:
        return u.mcr
    if offset == LSR:
        return read_lsr(u)
    if offset == MSR:
        return read_msr(u)
    return u.scr


cdef inline void write_ier(uart *u, uint8_t value) noexcept nogil:
    if value & ~u.ier & IER_THRE and u.thre:
        u.thre_pending = 1
    u.ier = value & IER_BITS


cdef inline void write_fcr(uart *u, uint8_t value) noexcept nogil:
    if (value ^ u.fcr) & FCR_ENABLE:
        clear_receiver(u)
    # The other bits mean something only together with the enable bit. Clearing the transmitter's
    # FIFO has nothing to do: what was written to it has been sent.
    elif value & FCR_ENABLE and value & FCR_CLEAR_RECEIVER:
        clear_receiver(u)
    u.fcr = value & (FCR_ENABLE | FCR_TRIGGER) if value & FCR_ENABLE else 0
    refill(u)


cdef inline void write_lcr(uart *u, uint8_t value) noexcept nogil:
    # A break has no place to go to on the host, but in loopback the port hears it.
    if value & ~u.lcr & LCR_BREAK and u.mcr & MCR_LOOP:
        receive_loopback(u, 0, LSR_BI)
    u.lcr = value


cdef inline void write_mcr(uart *u, uint8_t value) noexcept nogil:
    cdef uint8_t lines = MSR_CONNECTED
    cdef uint8_t changed
    u.mcr = value & MCR_BITS
    if u.mcr & MCR_LOOP:
        lines = ((MSR_CTS if u.mcr & MCR_RTS else 0) | (MSR_DSR if u.mcr & MCR_DTR else 0)
                 | (MSR_RI if u.mcr & MCR_OUT1 else 0) | (MSR_DCD if u.mcr & MCR_OUT2 else 0))
    changed = lines ^ u.msr & ~MSR_DELTAS
    if changed & MSR_RI and lines & MSR_RI:
        changed &= ~MSR_RI   # only the end of ringing is noted
    u.msr = lines | u.msr & MSR_DELTAS | changed >> 4
    update_thre(u)
    refill(u)


cdef inline void write_register(uart *u, uint64_t offset, uint8_t value) noexcept nogil:
    cdef bint dlab = u.lcr & LCR_DLAB
    if offset == DATA:
        if dlab:
            u.dll = value
        else:
            transmit(u, value)
    elif offset == IER:
        if dlab:
            u.dlm = value
        else:
            write_ier(u, value)
    elif offset == IIR:
        write_fcr(u, value)
    elif offset == LCR:
        write_lcr(u, value)
    elif offset == MCR:
        write_mcr(u, value)
    elif offset == SCR:
        u.scr = value
    # LSR and MSR: written by chip tests only


cdef inline void reset_registers(uart *u) noexcept nogil:
    """Master reset (data sheet, table 1). What waits on the host's side stays."""
    u.ier = u.fcr = u.lcr = u.mcr = u.scr = 0
    u.dll = 12   # 9600 baud, as firmware leaves it
    u.dlm = 0
    u.msr = MSR_CONNECTED
    u.overrun = u.thre_pending = u.active = u.looked = u.break_waiting = 0
    u.thre = 0
    clear_receiver(u)
    update_thre(u)
    u.thre_pending = 0
    refill(u)


cdef inline size_t input_put(uart *u, const uint8_t *data, size_t size) noexcept nogil:
    """Add host bytes as far as there is room; how many. The lock is held."""
    cdef size_t room = INPUT_SIZE - (u.input_put - u.input_taken)
    cdef size_t i
    size = min(size, room)
    for i in range(size):
        u.input[(u.input_put + i) % INPUT_SIZE] = data[i]
    u.input_put += size
    refill(u)
    update_irq(u)
    return size


cdef inline size_t output_peek(uart *u, uint8_t *data, size_t size) noexcept nogil:
    """Copy the oldest output without taking it; how many bytes. The lock is held."""
    cdef size_t start = u.output_taken % OUTPUT_SIZE
    cdef size_t first
    size = min(size, u.output_put - u.output_taken)
    first = min(size, OUTPUT_SIZE - start)
    memcpy(data, &u.output[start], first)
    memcpy(data + first, &u.output[0], size - first)
    return size


cdef inline void output_take(uart *u, uint64_t until) noexcept nogil:
    """Output before ``until`` is done with (it may have been overwritten meanwhile). The lock is held."""
    if until > u.output_taken:
        u.output_taken = until
    update_thre(u)
    update_irq(u)
    pthread_cond_broadcast(&u.progress)
