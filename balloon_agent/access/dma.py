"""Memory that a device may address: pinned pages whose guest-physical address is known.

An IOMMU that is between, if any, is told to leave addresses as they are: the frames in the balloon's buffers are guest-physical
whatever it does (spec 5.5.6), and so is everything else then.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from balloon_agent.errors import FrameMoved, NotPermitted
from balloon_agent.frames import FRAME
from balloon_agent.linux import libc
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.linux.pin import pin

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DmaPage:
    """4096 bytes, pinned. ``address`` is guest-physical."""

    address: int
    view: memoryview


class DmaMemory:
    """Owns pinned pages. They must outlive the device's enabled state: close only after a reset (spec 3.3.1).

    ``admit`` tells an IOMMU of a page, by the guest-physical address and the one in this process; ``expel`` has it forget that.
    """

    def __init__(
        self,
        pagemap: Pagemap,
        admit: Callable[[int, int], None] = lambda physical, address: None,
        expel: Callable[[int], None] = lambda physical: None,
    ) -> None:
        self._pagemap = pagemap
        self._admit = admit
        self._expel = expel
        self._regions: list[tuple[int, int, Sequence[int]]] = []  # address, bytes, descriptors that keep it in place
        self._views: list[memoryview] = []
        self.frames: set[int] = set()

    def allocate(self, count: int) -> list[DmaPage]:
        """``count`` pages, zeroed. They need not follow one another in guest-physical memory."""
        size = count * FRAME
        address = libc.map_anonymous(size)
        fds: Sequence[int] = ()
        admitted: list[int] = []
        try:
            libc.advise(address, size, libc.MADV_NOHUGEPAGE)
            libc.advise(address, size, libc.MADV_POPULATE_WRITE)
            fds = _hold(address, size)
            frames = self._pagemap.frames(address, count)
            for number, frame in enumerate(frames):
                self._admit(frame * FRAME, address + number * FRAME)
                admitted.append(frame * FRAME)
        except BaseException:
            for physical in admitted:
                self._expel(physical)
            for fd in fds:
                os.close(fd)
            libc.unmap(address, size)
            raise
        self._regions.append((address, size, fds))
        self.frames.update(frames)
        pages = [DmaPage(frame * FRAME, libc.view(address + number * FRAME, FRAME)) for number, frame in enumerate(frames)]
        self._views += [page.view for page in pages]
        return pages

    def verify(self) -> None:
        """FrameMoved if any page is not where the device was told that it is."""
        now = {frame for address, size, _ in self._regions for frame in self._pagemap.frames(address, size // FRAME)}
        if now != self.frames:
            raise FrameMoved("a ring page is not where the device was told it is: the pin did not hold")

    def close(self) -> None:
        """Unpin and unmap everything. The device must have been reset."""
        for view in self._views:
            view.release()
        for frame in self.frames:
            self._expel(frame * FRAME)
        for address, size, fds in self._regions:
            for fd in fds:
                os.close(fd)
            libc.unmap(address, size)
        self._views.clear()
        self._regions.clear()
        self.frames.clear()


def _hold(address: int, size: int) -> Sequence[int]:
    """Descriptors that keep memory where it is until all of them are closed: a pin, or else the next best thing."""
    try:
        return [pin([(address, size)])]
    except NotPermitted as error:
        _log.debug("%s; ring pages are held in a pipe", error)
        return hold_in_pipe(address, size // FRAME)


def hold_in_pipe(address: int, count: int) -> tuple[int, int]:
    """Keep ``count`` pages from moving by references that a pipe has to them; returns its two ends, which release them.

    What has a reference that nobody can account for is not migrated. Unlike a pin it does not move pages out of a movable zone
    first, so that it suits a few pages, where io_uring is switched off. Source: vmsplice(2).
    """
    source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # A page a slot: at least as many as there are pages.
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, max(count, 16) * FRAME)
        vector = array("L", [address, count * FRAME])
        taken = libc.syscall("vmsplice", sink, vector.buffer_info()[0], 1, 0)
        if taken != count * FRAME:
            raise OSError(errno.EAGAIN, f"vmsplice: {taken} of {count * FRAME} bytes")
    except BaseException:
        os.close(source)
        os.close(sink)
        raise
    return source, sink
