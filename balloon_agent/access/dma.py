"""Memory that a device may address, without an IOMMU: pinned pages whose guest-physical address is known."""

from __future__ import annotations

import os
from dataclasses import dataclass

from balloon_agent.errors import FrameMoved
from balloon_agent.memory import libc
from balloon_agent.memory.frames import FRAME
from balloon_agent.memory.pagemap import Pagemap
from balloon_agent.memory.pin import pin


@dataclass(frozen=True)
class DmaPage:
    """4096 bytes, pinned. ``address`` is guest-physical."""

    address: int
    view: memoryview


class DmaMemory:
    """Owns pinned pages. They must outlive the device's enabled state: close only after a reset (spec 3.3.1)."""

    def __init__(self, pagemap: Pagemap) -> None:
        self._pagemap = pagemap
        self._regions: list[tuple[int, int, int]] = []  # address, bytes, pin
        self._views: list[memoryview] = []
        self.frames: set[int] = set()

    def allocate(self, count: int) -> list[DmaPage]:
        """``count`` pages, zeroed. They need not follow one another in guest-physical memory."""
        size = count * FRAME
        address = libc.map_anonymous(size)
        fd = -1
        try:
            libc.advise(address, size, libc.MADV_NOHUGEPAGE)
            libc.advise(address, size, libc.MADV_POPULATE_WRITE)
            fd = pin([(address, size)])
            frames = self._pagemap.frames(address, count)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            libc.unmap(address, size)
            raise
        self._regions.append((address, size, fd))
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
        for address, size, fd in self._regions:
            os.close(fd)
            libc.unmap(address, size)
        self._views.clear()
        self._regions.clear()
        self.frames.clear()
