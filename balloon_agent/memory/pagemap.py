"""Which guest-physical frame is behind a virtual address: /proc/PID/pagemap and /proc/kpageflags.

Sources: Documentation/admin-guide/mm/pagemap.rst of the kernel.
"""

from __future__ import annotations

import os
from array import array

from balloon_agent.errors import NotPermitted

from .frames import FRAME, FRAMES_PER_HUGE

_ENTRY = 8
_PRESENT = 1 << 63
_FRAME_MASK = (1 << 55) - 1
KPF_COMPOUND_HEAD, KPF_HUGE, KPF_THP = 1 << 15, 1 << 17, 1 << 22


class Pagemap:
    """A process's own page table, as the kernel shows it. Holds two file descriptors until closed."""

    def __init__(self, proc_root: str = "/proc") -> None:
        self._path = f"{proc_root}/self/pagemap"
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
            raise NotPermitted(f"{self._path} shows frame number 0: reading it needs CAP_SYS_ADMIN; run as root")
        return frames

    def huge_frame(self, address: int) -> int | None:
        """The first frame of the aligned 2 MiB behind ``address``, or None if they are not 512 frames in a row."""
        entries = self._entries(address, FRAMES_PER_HUGE)
        first = entries[0]
        frame = first & _FRAME_MASK
        if not first & _PRESENT:
            return None
        if frame == 0:
            raise NotPermitted(f"{self._path} shows frame number 0: reading it needs CAP_SYS_ADMIN; run as root")
        if frame % FRAMES_PER_HUGE:
            return None
        # The pages of one huge page differ in nothing but their number.
        return frame if entries == array("Q", range(first, first + FRAMES_PER_HUGE)) else None

    def flags(self, frame: int) -> int:
        """/proc/kpageflags of one frame."""
        if self._flags_fd is None:
            self._flags_fd = os.open(self._flags_path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._flags_fd, _ENTRY, frame * _ENTRY)
        if len(data) != _ENTRY:
            raise LookupError(f"{self._flags_path}: no flags for frame {frame:#x}")
        return int.from_bytes(data, "little")

    def is_huge_head(self, frame: int) -> bool:
        """Whether the frame begins one huge page of the kernel's, so that one reference holds all of it."""
        flags = self.flags(frame)
        return bool(flags & KPF_COMPOUND_HEAD and flags & (KPF_THP | KPF_HUGE))

    def _entries(self, address: int, count: int) -> array[int]:
        if address % FRAME:
            raise ValueError(f"{address:#x} is not the address of a page")
        data = os.pread(self._fd, count * _ENTRY, address // FRAME * _ENTRY)
        if len(data) != count * _ENTRY:
            raise LookupError(f"{self._path}: {len(data)} bytes at page {address // FRAME:#x}, not {count * _ENTRY}")
        return array("Q", data)
