"""Runs of guest-physical frames: pure arithmetic. A frame is 4096 bytes, whatever the page size of the guest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple, Self

FRAME = 4096
HUGE = 2 << 20
FRAMES_PER_HUGE = HUGE // FRAME
# A device may look up a run by a 32-bit size in bytes, so none reaches or crosses 4 GiB.
FOUR_GIB_FRAMES = (4 << 30) // FRAME


class _Run(NamedTuple):
    first: int
    count: int  # type: ignore[assignment]  # a run's count hides tuple's, which nobody needs here


class Run(_Run):
    """``count`` contiguous frames from ``first`` on. Runs sort by their place."""

    # A tuple: there can be very many, and holders are spared the import of dataclasses.
    __slots__ = ()

    def __new__(cls, first: int, count: int) -> Self:
        if first < 0 or count < 1:
            raise ValueError(f"no run: {count} frames from {first:#x}")
        return super().__new__(cls, first, count)

    @property
    def end(self) -> int:
        """The frame behind the last one."""
        return self.first + self.count

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * FRAME


# A run from two numbers that are known to make one: not checked again, which takes several times as long as all the rest.
unchecked: Callable[[Iterable[int]], Run] = partial(tuple.__new__, Run)


def join(runs: Iterable[Run]) -> list[Run]:
    """The same frames in as few runs as there can be, in order. ValueError if a frame is there twice."""
    joined: list[Run] = []
    begin = end = -1
    # Sorted by a number, which is several times quicker than by the runs themselves; two from one place are refused anyway.
    for first, count in sorted(runs, key=itemgetter(0)):
        if first != end:
            if first < end:
                raise ValueError(f"frame {first:#x} is in two runs")
            if begin != end:
                joined.append(unchecked((begin, end - begin)))
            begin = first
        end = first + count
    if begin != end:
        joined.append(unchecked((begin, end - begin)))
    return joined


def from_frames(frames: Iterable[int]) -> list[Run]:
    """Single frames, in any order, as runs. ValueError if one is there twice."""
    return from_pages(frames, FRAME)


def from_pages(pages: Iterable[int], page_size: int) -> list[Run]:
    """Pages of ``page_size`` bytes by their numbers, in any order, as runs of frames: as few as there can be, in order.

    ValueError if a page is there twice, or a page is not a whole number of frames.
    """
    scale, rest = divmod(page_size, FRAME)
    if rest or scale < 1:
        raise ValueError(f"pages of {page_size} bytes are no multiple of {FRAME}")
    ascending = sorted(pages)
    if not ascending:
        return []
    begin = end = ascending[0]
    if begin < 0:
        raise ValueError(f"no page: {begin}")
    runs: list[Run] = []
    for page in ascending:
        # Numbers until a run is complete: most often there are far fewer runs than pages.
        if page != end:
            if page < end:
                raise ValueError(f"page {page:#x} is there twice")
            runs.append(unchecked((begin * scale, (end - begin) * scale)))
            begin = page
        end = page + 1
    runs.append(unchecked((begin * scale, (end - begin) * scale)))
    return runs


def split(runs: Iterable[Run], boundary: int, cuts: Sequence[int] = ()) -> Iterator[Run]:
    """The same frames in runs that cross no multiple of ``boundary`` frames, none of 4 GiB, and none of ``cuts``.

    ``cuts`` are frames at which a run has to end wherever it began, ascending. Every run is smaller than 4 GiB.
    """
    # Between these two nothing is to be cut. Neighbours have them in common: runs mostly come in order.
    begin = limit = 0
    for run in runs:
        first, count = run
        end = first + count
        while first < end:
            if not begin <= first < limit:
                begin = first
                limit = min((first // boundary + 1) * boundary, (first // FOUR_GIB_FRAMES + 1) * FOUR_GIB_FRAMES)
                following = bisect_right(cuts, first)
                if following < len(cuts):
                    limit = min(limit, cuts[following])
            until = min(end, limit)
            if until - first == FOUR_GIB_FRAMES:
                # In the middle, not one frame before the end: both halves are whole huge pages, of any size there is.
                until -= FOUR_GIB_FRAMES // 2
            yield run if until - first == count else unchecked((first, until - first))
            first = until


def total(runs: Iterable[Run]) -> int:
    """Bytes in all of them."""
    return sum(run.count for run in runs) * FRAME
