"""Taking memory inside a holder: populate, pin, translate, verify; and letting go of it again.

Runs in the holder process, which owns what is taken here. Each extent has an io_uring ring of its own, so that it can be
let go alone, and so that the agent can hold a duplicate of that pin while the extent is on its way to the host.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

from balloon_agent.errors import Shortage

from . import libc
from .frames import FRAME, FRAMES_PER_HUGE, HUGE, Run, from_frames, join
from .pagemap import Pagemap
from .pin import pin

# So many huge pages in a row that came back as small ones mean: the kernel has none left, stop asking.
MISSES = 3


class Held:
    """An extent as its holder knows it: where it is mapped (address, bytes), its pin, and the frames behind the mappings.

    ``frames`` has a run for each huge page of ``thp``, for each page of ``pages``, in the order of addresses.
    """

    def __init__(self, source: str, mappings: list[tuple[int, int]], fd: int, frames: list[Run]) -> None:
        self.source = source
        self.mappings = mappings
        self.pin = fd
        self.frames = frames


def populate(address: int, size: int) -> str | None:
    """Have the kernel back memory now. None if it did, else what it said; never a signal, as touching it could be."""
    try:
        libc.advise(address, size, libc.MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Shortage("this kernel does not know MADV_POPULATE_WRITE: 5.14 or later is needed") from error
        return error.strerror or str(error)
    return None


def take_thp(pagemap: Pagemap, count: int) -> Held:
    """At most ``count`` transparent huge pages, each whole and aligned. Shortage if there is not one.

    What comes back as small pages is returned to the kernel at once.
    """
    reserved = (count + 1) * HUGE
    base = libc.map_anonymous(reserved)
    begin = -(-base // HUGE) * HUGE
    kept: list[tuple[int, int]] = []
    fd = -1
    try:
        libc.advise(base, reserved, libc.MADV_HUGEPAGE)
        candidates = _populate_huge(pagemap, range(begin, begin + count * HUGE, HUGE))
        # One page pinned holds its whole huge page. The pin comes first: it may move pages out of a movable zone.
        fd = pin((address, FRAME) for address in candidates)
        for address in candidates:
            frame = pagemap.huge_frame(address)
            # 512 frames in a row need not be one page of the kernel's, and then the pin would hold a single one of them.
            if frame is not None and pagemap.is_huge_head(frame):
                kept.append((address, frame))
        if not kept:
            raise Shortage("the huge pages fell apart before they were pinned")
        if len(kept) < len(candidates):
            # The first pin would keep what is let go here, too. Each page kept is pinned all the time.
            first, fd = fd, pin((address, FRAME) for address, _ in kept)
            os.close(first)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        libc.unmap(base, reserved)
        raise
    _unmap_between(base, reserved, [address for address, _ in kept])
    return Held("thp", [(address, HUGE) for address, _ in kept], fd, [Run(frame, FRAMES_PER_HUGE) for _, frame in kept])


def _populate_huge(pagemap: Pagemap, addresses: Iterable[int]) -> list[int]:
    """Those addresses behind which a whole huge page came. Shortage if there is none."""
    found: list[int] = []
    misses, problem = 0, None
    for address in addresses:
        problem = populate(address, HUGE)
        if problem is None and pagemap.huge_frame(address) is not None:
            found.append(address)
            misses = 0
            continue
        # Small pages go back to the kernel at once, but the addresses stay ours until all is done:
        # somebody else's mapping could move in there, and be unmapped with the rest.
        libc.advise(address, HUGE, libc.MADV_DONTNEED)
        misses += 1
        if problem is not None or misses == MISSES:
            break
    if not found:
        raise Shortage(problem or f"huge pages came back as pages of {FRAME} bytes: memory is fragmented")
    return found


def take_pages(pagemap: Pagemap, count: int) -> Held:
    """``count`` single pages, exactly. Shortage if they are not to be had."""
    size = count * FRAME
    address = libc.map_anonymous(size)
    try:
        libc.advise(address, size, libc.MADV_NOHUGEPAGE)
        if problem := populate(address, size):
            raise Shortage(problem)
        fd = pin([(address, size)])
        try:
            frames = [Run(frame, 1) for frame in pagemap.frames(address, count)]
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        libc.unmap(address, size)
        raise
    return Held("pages", [(address, size)], fd, frames)


def frames_now(pagemap: Pagemap, held: Held) -> list[Run]:
    """The frames behind an extent at this moment, as one list of runs. LookupError if any is gone."""
    frames: list[int] = []
    for address, size in held.mappings:
        frames += pagemap.frames(address, size // FRAME)
    return from_frames(frames)


def is_in_place(pagemap: Pagemap, held: Held) -> bool:
    """Whether every frame is where it was when it was taken."""
    if held.source == "thp":
        return all(
            pagemap.huge_frame(address) == run.first for (address, _), run in zip(held.mappings, held.frames, strict=True)
        )
    try:
        return frames_now(pagemap, held) == join(held.frames)
    except LookupError:
        return False


def let_go(held: Held) -> None:
    """Give the memory back to the guest's kernel. The pin goes last, so that memory is whole until it is gone."""
    for address, size in held.mappings:
        libc.unmap(address, size)
    os.close(held.pin)


def _unmap_between(base: int, size: int, kept: Sequence[int]) -> None:
    """Unmap everything in the region but the huge pages at the addresses in ``kept``, which ascend."""
    at = base
    for begin in [*kept, base + size]:
        if begin > at:
            libc.unmap(at, begin - at)
        at = begin + HUGE
