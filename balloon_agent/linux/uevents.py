"""Kernel events about one subsystem's devices, from a netlink socket: each add, remove, online, bind and so on."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

import pyudev

# Of the kernel itself: what udev makes of it is not needed, and there may be no udev.
_SOURCE = "kernel"
_BUFFER = 4 << 20  # bytes


class Uevents:
    """A netlink socket, open from construction until ``close``."""

    def __init__(self, subsystem: str) -> None:
        # The socket belongs to it.
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=_SOURCE)
        self._monitor.filter_by(subsystem)
        # The kernel tells of all subsystems, and they are only sorted out here. More room takes CAP_NET_ADMIN.
        with suppress(OSError):
            self._monitor.set_receive_buffer_size(_BUFFER)
        self._monitor.start()

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return int(self._monitor.fileno())

    def take(self) -> list[tuple[str, str]] | None:
        """Action and device name of each event since the last call; None if some were lost. Does not block."""
        found: list[tuple[str, str]] = []
        complete = True
        while True:
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                # pyudev raises what poll reports without its number. Asking the socket for it clears it, too.
                if (error.errno or self._socket_error()) != errno.ENOBUFS:
                    raise
                # More events than there is room for: what they were is not known any more.
                complete = False
                continue
            if device is None:
                return found if complete else None
            found.append((str(device.action), str(device.sys_name)))

    def _socket_error(self) -> int:
        with socket.socket(fileno=os.dup(self.fileno())) as same:
            return same.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def close(self) -> None:
        # pyudev closes the socket when nobody refers to the monitor.
        del self._monitor
