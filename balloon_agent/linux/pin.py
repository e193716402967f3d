"""Pins: memory that the kernel will not move. mlock is none, for it only keeps memory from being swapped out.

A buffer registered with io_uring is pinned for the long term (FOLL_LONGTERM): compaction, migration and block
offlining leave it where it is, and it stays allocated even when its process dies, as long as somebody has the ring's
file descriptor. The ring is never used for anything else. A pin of one page holds the whole huge page it is part of.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Iterable

from balloon_agent.errors import NotPermitted, Obstacle

from . import libc

# include/uapi/linux/io_uring.h
_REGISTER_BUFFERS = 0
_PARAMS_SIZE = 120
LARGEST_COUNT = 16384
LARGEST_BUFFER = 1 << 30


def pin(pieces: Iterable[tuple[int, int]]) -> int:
    """Pin (address, bytes) pieces of this process's memory, and return the file descriptor that is the pin.

    Closing the descriptor, and every duplicate of it, is the unpinning. Pages in a movable zone are moved out of it
    by this, so translate afterwards. At most 16384 pieces of at most 1 GiB. NotPermitted where io_uring is switched off.
    """
    # struct iovec: address and length, a machine word each.
    vectors = array("L", [word for piece in pieces for word in piece])
    params = ctypes.create_string_buffer(_PARAMS_SIZE)
    try:
        fd = libc.syscall("io_uring_setup", 1, ctypes.addressof(params))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise NotPermitted(
                f"memory cannot be pinned, io_uring is not to be had ({error.strerror})", "set kernel.io_uring_disabled=0"
            ) from error
        raise
    try:
        if not vectors:
            return fd
        libc.syscall("io_uring_register", fd, _REGISTER_BUFFERS, vectors.buffer_info()[0], len(vectors) // 2)
    except BaseException:
        os.close(fd)
        raise
    return fd


def obstacle_to_pinning() -> Obstacle | None:
    """The reason for which nothing can be pinned here; None if it can."""
    try:
        os.close(pin([]))
    except NotPermitted as error:
        return Obstacle.of(error)
    return None


def duplicate_from(pidfd: int, fd: int) -> int:
    """A duplicate, in this process, of another process's descriptor: its pin holds until both are closed."""
    return libc.syscall("pidfd_getfd", pidfd, fd, 0)
