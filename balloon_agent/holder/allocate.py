"""Taking memory inside a holder: populate, pin, translate; and letting go of it again.

Runs in the holder process, which owns what is taken here. Each extent has an io_uring ring of its own, so that it can be
let go alone, and so that the agent can hold a duplicate of that pin while the extent is on its way to the host.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from itertools import compress

from balloon_agent.errors import Shortage
from balloon_agent.frames import FRAME, HUGE
from balloon_agent.linux import libc
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.linux.pin import pin

from .mapping import Pieces, pieces_of

PHASES = ("populate", "pin", "translate")
# So many huge pages in a row that came back as small ones mean: the kernel has none left, stop asking.
MISSES = 3
# Huge pages are asked for one, two, four at a time and so on as long as they come, and this many at most: what turns out to be
# small has been allocated and zeroed for nothing, and while the kernel is at it nobody can have it give way.
MOST_AT_ONCE = 4
# For the same reason so many bytes at most of anything else, but for a page of 1 GiB, which comes whole.
PART = MOST_AT_ONCE * HUGE
NOT_PINNED = -1
# Bytes of the pages of hugetlbfs, by source.
HUGETLB_SIZES = {"hugetlb": HUGE, "hugetlb-1g": 1 << 30}


class Held:
    """An extent as its holder knows it: where it is mapped and what is behind that, in pages of ``unit`` bytes, and its pin."""

    def __init__(self, source: str, unit: int, pieces: Pieces, fd: int) -> None:
        self.source = source
        self.unit = unit
        self.pieces = pieces
        self.pin = fd


class Stopwatch:
    """Seconds by phase, while an extent is taken."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.monotonic()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase."""
        now = time.monotonic()
        self.seconds[phase] += now - self._since
        self._since = now


def populate(address: int, size: int) -> str | None:
    """Have the kernel back memory now. None if it did, else what it said; never a signal, as touching it could be."""
    try:
        libc.advise(address, size, libc.MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Shortage("this kernel does not know MADV_POPULATE_WRITE: 5.14 or later is needed") from error
        return error.strerror or str(error)
    return None


def _populate_in_parts(address: int, size: int, check: Callable[[], None]) -> None:
    """All of it, or Shortage."""
    for offset in range(0, size, PART):
        check()
        if problem := populate(address + offset, min(PART, size - offset)):
            raise Shortage(problem)


def take_thp(
    pagemap: Pagemap,
    count: int,
    watch: Stopwatch,
    check: Callable[[], None] = lambda: None,
    *,
    pinned: bool = True,
    compact: bool = True,
    plenty: bool = False,
) -> Held:
    """At most ``count`` transparent huge pages, each whole and aligned. Shortage if there is not one.

    What comes back as small pages is returned to the kernel at once. Without ``compact`` only what lies ready is taken, as far
    as the kernel's settings allow: by default it moves pages for a huge page where madvise asks for one, and not elsewhere.
    With ``plenty`` many are asked for at once from the beginning, since there were many a moment ago.
    What ``check`` raises, between one part and the next, ends it: nothing is taken then. So it is with the others.
    """
    reserved = (count + 1) * HUGE
    base = libc.map_anonymous(reserved)
    begin = -(-base // HUGE) * HUGE
    kept: list[tuple[int, int]] = []
    fd = NOT_PINNED
    try:
        if compact:
            libc.advise(base, reserved, libc.MADV_HUGEPAGE)
        candidates = _populate_huge(pagemap, begin, count, MOST_AT_ONCE if plenty else 1, check)
        watch.lap("populate")
        # One page pinned holds its whole huge page. The pin comes first: it may move pages out of a movable zone.
        fd = _hold(candidates, HUGE, pinned=pinned)
        watch.lap("pin")
        frames = pagemap.huge_frames(begin, count)
        found = [(address, frame) for address in candidates if (frame := frames[(address - begin) // HUGE]) is not None]
        # 512 frames in a row need not be one page of the kernel's, and then the pin would hold a single one of them.
        kept = [*compress(found, pagemap.are_huge(frame for _, frame in found))]
        if not kept:
            raise Shortage("the huge pages fell apart before they were pinned")
        if len(kept) < len(candidates):
            # The first pin would keep what is let go here, too. Each page kept is pinned all the time.
            first, fd = fd, _hold([address for address, _ in kept], HUGE, pinned=pinned)
            _close(first)
        held = Held("thp", HUGE, pieces_of(kept, HUGE), fd)
        watch.lap("translate")
        # Where a process may have no more mappings (vm.max_map_count), this fails; to unmap all of it does not.
        _unmap_between(base, reserved, [address for address, _ in kept])
    except BaseException:
        _close(fd)
        libc.unmap(base, reserved)
        raise
    watch.lap("populate")
    return held


def _populate_huge(pagemap: Pagemap, begin: int, count: int, ask: int, check: Callable[[], None]) -> list[int]:
    """Those addresses from ``begin`` on behind which a whole huge page came; ``ask`` at first. Shortage if there is none."""
    found: list[int] = []
    misses, problem, at = 0, None, 0
    while at < count and misses < MISSES and problem is None:
        check()
        ask = min(ask, count - at, MOST_AT_ONCE)
        address = begin + at * HUGE
        problem = populate(address, ask * HUGE)
        came = 0
        for number, frame in enumerate(pagemap.huge_frames(address, ask)):
            if frame is not None:
                found.append(address + number * HUGE)
                came += 1
            else:
                # Small pages go back to the kernel at once, but the addresses stay ours until all is done:
                # somebody else's mapping could move in there, and be unmapped with the rest.
                # What is locked would not go.
                libc.unlock(address + number * HUGE, HUGE)
                libc.advise(address + number * HUGE, HUGE, libc.MADV_DONTNEED)
        misses = 0 if came else misses + 1
        at += ask
        ask = ask * 2 if came == ask else 1
    if not found:
        raise Shortage(problem or f"huge pages came back as pages of {FRAME} bytes: memory is fragmented")
    return found


def take_hugetlb(
    pagemap: Pagemap,
    source: str,
    count: int,
    watch: Stopwatch,
    check: Callable[[], None] = lambda: None,
    *,
    pinned: bool = True,
) -> Held:
    """``count`` huge pages of hugetlbfs' pool, exactly. Shortage if the pool has not that many."""
    unit = HUGETLB_SIZES[source]
    size = count * unit
    memory = libc.memfd_huge(source, unit)
    try:
        os.ftruncate(memory, size)
        # The mapping reserves its pages, or fails: there is no signal to come for what is missing.
        address = libc.map_shared(memory, size)
    except OSError as error:
        raise Shortage(f"{count} huge pages of {unit >> 10} kB are not to be had: {error.strerror}") from error
    finally:
        os.close(memory)
    fd = NOT_PINNED
    try:
        _populate_in_parts(address, size, check)
        watch.lap("populate")
        addresses = range(address, address + size, unit)
        try:
            fd = _hold(addresses, unit, pinned=pinned)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            # To pin them they would have to leave that zone, and the kernel looks for their new place in it again.
            raise Shortage("huge pages of hugetlbfs cannot be pinned where they come from ZONE_MOVABLE: use thp") from error
        watch.lap("pin")
        frames = pagemap.huge_frames(address, count, unit)
        found = [(at, frame) for at, frame in zip(addresses, frames, strict=True) if frame is not None]
        whole = [*compress(found, pagemap.are_huge((frame for _, frame in found), unit))]
        if len(whole) < count:
            raise Shortage(f"only {len(whole)} of {count} pages from hugetlbfs are whole pages of {unit >> 10} kB")
    except BaseException:
        _close(fd)
        libc.unmap(address, size)
        raise
    watch.lap("translate")
    return Held(source, unit, pieces_of(whole, unit), fd)


def take_pages(
    pagemap: Pagemap,
    count: int,
    watch: Stopwatch,
    check: Callable[[], None] = lambda: None,
    *,
    pinned: bool = True,
) -> Held:
    """``count`` single pages, exactly. Shortage if they are not to be had."""
    size = count * FRAME
    address = libc.map_anonymous(size)
    fd = NOT_PINNED
    try:
        libc.advise(address, size, libc.MADV_NOHUGEPAGE)
        _populate_in_parts(address, size, check)
        watch.lap("populate")
        fd = _hold([address], size, pinned=pinned, single=True)
        watch.lap("pin")
        pieces = pieces_of(zip(range(address, address + size, FRAME), pagemap.frames(address, count), strict=True), FRAME)
    except BaseException:
        _close(fd)
        libc.unmap(address, size)
        raise
    watch.lap("translate")
    return Held("pages", FRAME, pieces, fd)


def _hold(addresses: Sequence[int], size: int, *, pinned: bool, single: bool = False) -> int:
    """Pin the ``size`` bytes at each address: one page holds a huge one, ``single`` ones are pinned each.

    Where that must not be, at least keep all of it from being swapped out.
    """
    if pinned:
        return pin((address, size if single else FRAME) for address in addresses)
    for address in addresses:
        libc.lock(address, size)
    return NOT_PINNED


def _close(fd: int) -> None:
    if fd != NOT_PINNED:
        os.close(fd)


def let_go(held: Held) -> None:
    """Give the memory back to the guest's kernel. The pin goes last, so that memory is whole until it is gone."""
    # Neighbours in one go.
    begin = end = 0
    for piece in held.pieces:
        if piece.address != end:
            if end:
                libc.unmap(begin, end - begin)
            begin = piece.address
        end = piece.address + piece.frames * FRAME
    libc.unmap(begin, end - begin)
    _close(held.pin)


def _unmap_between(base: int, size: int, kept: Sequence[int]) -> None:
    """Unmap everything in the region but the huge pages at the addresses in ``kept``, which ascend."""
    at = base
    for begin in [*kept, base + size]:
        if begin > at:
            libc.unmap(at, begin - at)
        at = begin + HUGE
