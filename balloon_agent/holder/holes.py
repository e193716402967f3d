"""Holes of huge pages: frames of a transparent huge page that no process maps any more, and that are not free all the same.

A program that gives up a part of a huge page (MADV_DONTNEED, munmap) leaves all of it allocated. The kernel splits it once
reclaim gets there (deferred_split_scan() in mm/huge_memory.c); until then its holes are neither free nor in MemAvailable.
Here such pages are found by the page tables of processes that map the rest, and split one by one by debugfs: that frees the
holes, evicts nothing, and changes nothing for the program, whose page table has small pages there already.

Runs in the worker: both take other processes' locks, which can take long.
Sources: split_huge_pages_write() in mm/huge_memory.c, pagemap.rst in Documentation/admin-guide/mm, proc.rst in
Documentation/filesystems.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import BinaryIO, NamedTuple

from balloon_agent.frames import FRAME, FRAMES_PER_HUGE, HUGE
from balloon_agent.linux.pagemap import Look, MemoryGone, Pagemap

SPLIT_HUGE_PAGES = "/sys/kernel/debug/split_huge_pages"
# Frames: a huge page with fewer holes is left whole, since what it would give is less than what a huge page is worth.
LEAST_HOLES = 32
# Address space looked at at once: 64 KiB of page table entries.
_CHUNK = 16 * HUGE
_ENTRY = 8
# Bytes: of a larger area most is reserved only. It is left as soon as all that is there has been seen.
_SPARSE = 16 << 30
# Bytes of smaps that are read at once, and the last line of each mapping in it.
_PIECE = 64 << 10
_LAST_FIELD = b"\nVmFlags:"


class Holed(NamedTuple):
    """A huge page with holes: a page of it that is mapped, by process and address, its first frame, and its number of holes."""

    pid: int
    address: int
    frame: int
    holes: int


class Walk:
    """Looks for huge pages with holes through all processes but those in ``skip``, those with the most memory first.

    Iterating yields what was found in each piece of address space, for time to be looked at: often nothing. ``denied`` counts
    processes that may not be looked through.
    """

    def __init__(self, skip: Collection[int] = (), proc_root: str = "/proc") -> None:
        self._skip = frozenset(skip)
        self._root = proc_root
        self.denied = 0

    def __iter__(self) -> Iterator[list[Holed]]:
        counts = os.open(f"{self._root}/kpagecount", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for pid in self._processes():
                # A process may end meanwhile.
                with suppress(FileNotFoundError, ProcessLookupError, MemoryGone):
                    try:
                        yield from self._process(pid, counts)
                    except PermissionError:
                        self.denied += 1
        finally:
            os.close(counts)

    def _processes(self) -> list[int]:
        sizes: dict[int, int] = {}
        for name in os.listdir(self._root):
            if name.isdigit() and int(name) not in self._skip:
                with suppress(OSError):
                    # Threads of the kernel have no such line.
                    _, _, rest = _read(f"{self._root}/{name}/status").partition(b"\nRssAnon:")
                    sizes[int(name)] = int(rest.split(None, 1)[0]) if rest else 0
        return sorted((pid for pid, size in sizes.items() if size), key=lambda pid: -sizes[pid])

    def _process(self, pid: int, counts: int) -> Iterator[list[Holed]]:
        # Piece by piece: of many mappings it is long, and the kernel holds the process's lock for a piece at a time.
        with open(f"{self._root}/{pid}/smaps", "rb", buffering=0) as smaps, closing(Pagemap(self._root, pid)) as pagemap:
            for begin, end, left in _areas(_pieces(smaps)):
                if not left:
                    yield []
                # At the boundaries of huge pages, so that none is seen twice.
                for at in range(begin // _CHUNK * _CHUNK, end if left else begin, _CHUNK):
                    first = max(begin, at)
                    look = pagemap.look(first, (min(end, at + _CHUNK) - first) // FRAME)
                    yield self._holed(pagemap, counts, pid, first, look)
                    left -= look.present.count(1)
                    if left <= 0 and end - begin > _SPARSE:
                        break

    @staticmethod
    def _holed(pagemap: Pagemap, counts: int, pid: int, begin: int, look: Look) -> list[Holed]:
        found: list[Holed] = []
        at, present = 0, look.present
        while at < len(present):
            # To the end of what one huge page would back.
            end = at + FRAMES_PER_HUGE - (begin // FRAME + at) % FRAMES_PER_HUGE
            piece = present[at:end]
            if 0 < piece.count(1) < FRAMES_PER_HUGE:
                # A huge page mapped at an unaligned address ends within the piece: one lies on each side of that.
                for index in dict.fromkeys((at + piece.index(1), at + piece.rindex(1))):
                    frame = look.frame(index)
                    first = frame // FRAMES_PER_HUGE * FRAMES_PER_HUGE
                    if (not found or found[-1].frame != first) and (holes := _holes(pagemap, counts, first)):
                        found.append(Holed(pid, begin + index * FRAME, first, holes))
                    if (frame - begin // FRAME - index) % FRAMES_PER_HUGE == 0:
                        break
            at = end
        return found


def _holes(pagemap: Pagemap, counts: int, first: int) -> int:
    """How many there are in a huge page; 0 if they are too few, or this is none."""
    if not pagemap.are_huge([first])[0]:
        return 0
    # Mappings of all processes count: since a fork another one may map what this one has given up.
    data = os.pread(counts, FRAMES_PER_HUGE * _ENTRY, first * _ENTRY)
    # By the lowest byte alone: the chance that exactly 256 processes map a page is not worth more time.
    holes = data[::_ENTRY].count(0)
    return holes if holes >= LEAST_HOLES else 0


class Splitter:
    """Has the kernel split huge pages. OSError if that is not to be had. Holds a file descriptor until closed."""

    def __init__(self, path: str = SPLIT_HUGE_PAGES) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def split(self, holed: Holed) -> None:
        """Split one. A pinned or locked huge page stays whole without an error; a process that has ended is passed over."""
        with suppress(OSError):
            os.write(self._fd, f"{holed.pid},{holed.address:#x},{holed.address + FRAME:#x}".encode())

    def close(self) -> None:
        os.close(self._fd)


def freed(pagemap: Pagemap, split: Sequence[Holed]) -> int:
    """Frames that have come free since it was tried to split these."""
    whole = pagemap.are_huge(holed.frame for holed in split)
    return sum(holed.holes for holed, is_whole in zip(split, whole, strict=True) if not is_whole)


def _areas(pieces: Iterable[bytes]) -> Iterator[tuple[int, int, int]]:
    """Mappings in smaps: first and last address, and the number of anonymous pages; 0 of one without anonymous small pages."""
    # The values of VmFlags stand before the next mapping's first line, and are cut off there.
    rest = b"\n"
    for piece in pieces:
        *whole, rest = (rest + piece).split(_LAST_FIELD)
        for text in whole:
            anonymous = _kib(text, b"\nAnonymous:")
            huge = _kib(text, b"\nAnonHugePages:")
            # Address, access, offset, device, inode.
            addresses, _, _, _, inode = text[text.index(b"\n") + 1 :].split(None, 5)[:5]
            begin, end = (int(address, 16) for address in addresses.split(b"-"))
            yield begin, end, anonymous // (FRAME >> 10) if inode == b"0" and anonymous > huge else 0


def _kib(text: bytes, field: bytes) -> int:
    at = text.index(field) + len(field)
    return int(text[at : text.index(b"kB", at)])


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """A file's content, at most _PIECE bytes at a time."""
    while piece := file.read(_PIECE):
        yield piece


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
