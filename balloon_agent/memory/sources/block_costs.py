"""Which memory blocks are likely to be taken offline at little cost: a glance at some of their pages in /proc/kpageflags.

A block without used pages goes at once. In others each used page has to be moved, and a page that cannot be moved makes all of
that vain. What is used and what cannot be moved changes all the time, so that this only says what to try first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from balloon_agent.frames import FRAME, Run
from balloon_agent.linux import huge_page_pools
from balloon_agent.linux.page_flags import KPF_BUDDY, KPF_HUGE, KPF_NOPAGE, KPF_PGTABLE, KPF_RESERVED, KPF_SLAB

_ENTRY = 8
# Pages looked at in each block: so many places, so many pages in each.
PLACES, PAGES = 16, 16
_ALL_FREE = KPF_BUDDY.to_bytes(_ENTRY, "little") * (PLACES * PAGES)
# As if so many pages had to be moved.
UNLIKELY = 1 << 20


def _holding(flag: int) -> tuple[int, bytes]:
    """Offset of the byte with this flag in an entry, and a table that maps this byte to 1 if the flag is set, and else to 0."""
    position, bit = divmod(flag.bit_length() - 1, 8)
    return position, bytes(byte >> bit & 1 for byte in range(256))


_FREE = _holding(KPF_BUDDY)
_UNMOVABLE = [_holding(flag) for flag in (KPF_SLAB, KPF_NOPAGE, KPF_PGTABLE, KPF_RESERVED)]


def _count(entries: bytes, position: int, table: bytes) -> int:
    return entries[position::_ENTRY].translate(table).count(1)


def cost(entries: bytes) -> int:
    """How many of these pages are not free; UNLIKELY more if any of them belongs to the kernel, or is none at all."""
    used = len(entries) // _ENTRY - _count(entries, *_FREE)
    return used + (UNLIKELY if any(_count(entries, *flag) for flag in _UNMOVABLE) else 0)


class Survey:
    """The cost of blocks by /proc/kpageflags. Where that cannot be read, each costs something.

    Not to be taken at all are blocks with huge pages of a hugetlbfs pool in them: the kernel dissolves such pages when the
    block goes offline, and the pool stays smaller (dissolve_free_huge_pages() in mm/hugetlb.c).
    """

    def __init__(self, proc_root: str = "/proc", hugepages_root: str = huge_page_pools.HUGEPAGES_ROOT) -> None:
        self._path = f"{proc_root}/kpageflags"
        self._hugepages_root = hugepages_root

    def smallest_pooled(self) -> int | None:
        """Bytes of the smallest huge pages of which a pool has any, or None if all pools are empty."""
        return min(
            (
                size
                for size in huge_page_pools.sizes(self._hugepages_root)
                if huge_page_pools.has_any(self._hugepages_root, size)
            ),
            default=None,
        )

    def has_pooled(self, run: Run, smallest: int) -> bool:
        """Whether a huge page of a pool lies in it, of ``smallest`` bytes or more; also if that cannot be told."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            # Each page of a huge page has the flag, and each huge page a multiple of the smallest for its address.
            for frame in range(run.first, run.end, max(1, smallest // FRAME)):
                flags = int.from_bytes(os.pread(fd, _ENTRY, frame * _ENTRY), "little")
                if flags & KPF_HUGE and not flags & KPF_NOPAGE:
                    return True
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def costs(self, runs: Sequence[Run]) -> list[int]:
        """What it costs to empty each of these."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return [1] * len(runs)
        try:
            return [self._cost(fd, run) for run in runs]
        finally:
            os.close(fd)

    @staticmethod
    def _cost(fd: int, run: Run) -> int:
        # The first and the last pages too: holes and what firmware keeps lie at the ends of memory.
        places = (run.first + (run.count - PAGES) * place // (PLACES - 1) for place in range(PLACES))
        try:
            data = b"".join(os.pread(fd, PAGES * _ENTRY, first * _ENTRY) for first in places)
        except OSError:
            return UNLIKELY
        if data == _ALL_FREE:
            return 0
        return cost(data)
