"""Hearing of PCI functions that come, go, or change hands while the agent runs."""

from __future__ import annotations

import errno
from contextlib import suppress

import pyudev

# Of the kernel itself: what udev makes of it is not needed, and there may be no udev.
_SOURCE = "kernel"
_BUFFER = 4 << 20  # bytes
# A new function may be heard of before the kernel's own driver has it, and before one of ours can: each is worth another look.
_OF_INTEREST = ("add", "bind", "unbind")


class PciPlugging:
    """A netlink socket, open from construction until ``close``."""

    def __init__(self) -> None:
        # The socket belongs to it.
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=_SOURCE)
        self._monitor.filter_by("pci")
        # The kernel tells of memory blocks, too, and they are only sorted out here. More room takes CAP_NET_ADMIN.
        with suppress(OSError):
            self._monitor.set_receive_buffer_size(_BUFFER)
        self._monitor.start()

    def fileno(self) -> int:
        """Readable when there is something to ``drain``."""
        return int(self._monitor.fileno())

    def drain(self) -> bool:
        """Whether a function has come, or changed hands, since the last call. Does not block."""
        found = False
        while True:
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # There was more than there is room for: what it was is not known any more.
                found = True
                continue
            if device is None:
                return found
            found = found or device.action in _OF_INTEREST

    def close(self) -> None:
        # pyudev closes the socket when nobody refers to the monitor.
        del self._monitor
