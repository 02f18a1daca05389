# cython: language_level=3
"""One direction of one pair of virtio-net's queues (virtio 1.2, 5.1.6), between a ring and a tap."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .._virtqueue cimport iovec

cdef enum:
    MAX_BUFFERS = 1023      # of the guest in one readv or writev: UIO_MAXIOV, and one of ours
    HEADER = 12             # sizeof(struct virtio_net_hdr), num_buffers included
    ETHERNET = 14           # an Ethernet header: the shortest frame
    MAX_FRAME = 65535 + 18  # the largest IP packet, Ethernet header and a VLAN tag
    MAX_BYTES = 12 + 65535 + 18

cdef struct receiver:
    int fd                  # the tap
    bint mergeable          # VIRTIO_NET_F_MRG_RXBUF: a frame may fill several chains
    uint32_t patience_ms    # how long a frame waits for the guest to add buffers
    uint64_t frames
    uint64_t bytes          # without virtio_net_hdr
    uint64_t dropped        # no room, or not a frame
    uint64_t errors         # reads that failed
    # Chains that were taken from the ring ahead of the frame that will fill them.
    uint32_t chains
    uint32_t buffers        # of all of them
    uint64_t capacity       # bytes of all of them
    uint16_t heads[MAX_BUFFERS]
    uint32_t counts[MAX_BUFFERS]    # the buffers of each
    uint64_t sizes[MAX_BUFFERS]     # the bytes of each
    uint32_t lengths[MAX_BUFFERS]   # what a frame put into each
    iovec iov[MAX_BUFFERS + 1]
    uint8_t spill[MAX_BYTES]        # takes what is longer than the chains

cdef struct sender:
    int fd
    bint filter             # send frames from `mac` only
    uint8_t mac[6]
    uint64_t frames
    uint64_t bytes
    uint64_t dropped        # too short or too long
    uint64_t spoofed        # from another MAC
    uint64_t errors         # refused by the tap
    iovec iov[MAX_BUFFERS + 1]
    uint8_t headers[HEADER + ETHERNET]
    uint8_t bounce[MAX_BYTES]       # for frames in more pieces than a writev takes

cdef class Receiver:
    cdef receiver *state

cdef class Sender:
    cdef sender *state
