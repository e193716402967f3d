"""Which guest-physical frame is behind a virtual address: /proc/PID/pagemap and /proc/kpageflags.

Sources: Documentation/admin-guide/mm/pagemap.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from balloon_agent.errors import NotPermitted, Obstacle
from balloon_agent.frames import FRAME, HUGE
from balloon_agent.linux.page_flags import KPF_COMPOUND_TAIL, KPF_HUGE, KPF_THP

_ENTRY = 8
_PRESENT = 1 << 63
_FRAME_MASK = (1 << 55) - 1
# By the highest byte of an entry.
_IS_PRESENT = bytes(byte >> 7 for byte in range(256))


class MemoryGone(LookupError):
    """The process has no memory any more: it has died, or is about to."""


class Look:
    """Page table entries of adjoining pages. ``present`` has a byte for each: 1 if it is there, 0 if not."""

    def __init__(self, entries: memoryview) -> None:
        self._entries = entries
        self.present = entries.tobytes()[_ENTRY - 1 :: _ENTRY].translate(_IS_PRESENT)

    def frame(self, position: int) -> int:
        """The frame behind one that is present. 0 if the kernel hides frames."""
        return int(self._entries[position]) & _FRAME_MASK


class Pagemap:
    """A process's page table, as the kernel shows it: one's own, or another's. Holds two file descriptors until closed."""

    def __init__(self, proc_root: str = "/proc", process: int | str = "self") -> None:
        self._path = f"{proc_root}/{process}/pagemap"
        self._flags_path = f"{proc_root}/kpageflags"
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._flags_fd: int | None = None

    def close(self) -> None:
        for fd in (self._fd, self._flags_fd):
            if fd is not None:
                os.close(fd)

    def frames(self, address: int, count: int) -> list[int]:
        """The frames behind ``count`` pages of 4096 bytes from ``address``, which must all be present.

        LookupError names the first page that is not there; NotPermitted if the kernel hides the frame numbers.
        """
        entries = self._entries(address, count)
        frames = [entry & _FRAME_MASK for entry in entries]
        for position, entry in enumerate(entries):
            if not entry & _PRESENT:
                raise LookupError(
                    f"{self._path}: the page at {address + position * FRAME:#x} is not present (entry {entry:#x})"
                )
        # Without CAP_SYS_ADMIN every frame number reads 0. Frame 0 itself is never a process's.
        if 0 in frames:
            raise self._hidden()
        return frames

    def huge_frames(self, address: int, count: int, size: int = HUGE) -> list[int | None]:
        """For each of ``count`` adjoining pieces of ``size`` bytes: the first of its frames, aligned as the piece itself is.

        None for a piece that is not there, or whose last frame does not lie where the first one's huge page would end. Whether
        they are one page of the kernel's, ``are_huge`` tells.
        """
        pages = size // FRAME
        entries = self._entries(address, count * pages)
        # Their ends only: to look at every page here would take longer than all else together. The pages of a huge page differ
        # in nothing but their number, of which the lowest bits count within it: they begin with 0.
        rest = pages - 1
        found = [
            first & _FRAME_MASK if first & _PRESENT and not first & rest and last == first + rest else None
            for first, last in zip(entries[::pages].tolist(), entries[rest::pages].tolist(), strict=True)
        ]
        if 0 in found or None in found:
            self._check_not_hidden(entries[::pages])
        return found

    def look(self, address: int, count: int) -> Look:
        """At ``count`` pages from ``address``, present or not. LookupError if that is no address of this process."""
        return Look(self._entries(address, count))

    def flags(self, frames: Iterable[int]) -> list[int]:
        """/proc/kpageflags of each frame: 0, which says nothing, for one that there is not."""
        if self._flags_fd is None:
            self._flags_fd = os.open(self._flags_path, os.O_RDONLY | os.O_CLOEXEC)
        fd, read, number = self._flags_fd, os.pread, int.from_bytes
        return [number(read(fd, _ENTRY, frame * _ENTRY), "little") for frame in frames]

    def are_huge(self, frames: Iterable[int], size: int = HUGE) -> list[bool]:
        """Whether one huge page of the kernel's has all ``size`` bytes from each frame on, which is aligned to that.

        One reference, such as a pin of a single page in it, holds all of it then, and all its frames follow one another. There
        are smaller large pages too (folios of several sizes): powers of two in size and aligned to it, so that the frame in the
        middle would be the head of one. As the tail of any it is in one that has the rest as well.
        """
        half = size // FRAME // 2
        return [
            bool(flags & KPF_COMPOUND_TAIL and flags & (KPF_THP | KPF_HUGE))
            for flags in self.flags(frame + half for frame in frames)
        ]

    def _check_not_hidden(self, entries: memoryview) -> None:
        """NotPermitted if frame numbers read 0, which is what the kernel shows in place of those that it hides."""
        if any(entry & _PRESENT and not entry & _FRAME_MASK for entry in entries.tolist()):
            raise self._hidden()

    def _hidden(self) -> NotPermitted:
        return NotPermitted(f"{self._path} shows frame number 0", "reading it needs CAP_SYS_ADMIN; run as root")

    def _entries(self, address: int, count: int) -> memoryview:
        if address % FRAME:
            raise ValueError(f"{address:#x} is not the address of a page")
        data = os.pread(self._fd, count * _ENTRY, address // FRAME * _ENTRY)
        if not data:
            raise MemoryGone(f"{self._path}: nothing at page {address // FRAME:#x}")
        if len(data) != count * _ENTRY:
            raise LookupError(f"{self._path}: {len(data)} bytes at page {address // FRAME:#x}, not {count * _ENTRY}")
        return memoryview(data).cast("Q")


def obstacle_to_translating(proc_root: str = "/proc") -> Obstacle | None:
    """The reason for which the frames of one's own memory cannot be looked up here; None if they can."""
    try:
        page = ctypes.create_string_buffer(2 * FRAME)
        # Written to, so that it is there.
        ctypes.memset(page, 1, 2 * FRAME)
        pagemap = Pagemap(proc_root)
        try:
            pagemap.flags(pagemap.frames((ctypes.addressof(page) + FRAME - 1) // FRAME * FRAME, 1))
        finally:
            pagemap.close()
    except (NotPermitted, LookupError, OSError) as error:
        return Obstacle.of(error)
    return None
