"""Runs of guest-physical frames: pure arithmetic. A frame is 4096 bytes, whatever the page size of the guest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def join(runs: Iterable[Run]) -> list[Run]:
    """The same frames in as few runs as there can be, in order. ValueError if a frame is there twice."""
    joined: list[Run] = []
    for run in sorted(runs):
        if joined and run.first < joined[-1].end:
            raise ValueError(f"frame {run.first:#x} is in two runs")
        if joined and run.first == joined[-1].end:
            joined[-1] = Run(joined[-1].first, joined[-1].count + run.count)
        else:
            joined.append(run)
    return joined


def from_frames(frames: Iterable[int]) -> list[Run]:
    """Single frames, in any order, as runs. ValueError if one is there twice."""
    return join(Run(frame, 1) for frame in frames)


def split(runs: Iterable[Run], boundary: int) -> Iterator[Run]:
    """The same frames in runs that cross no multiple of ``boundary`` frames."""
    for run in runs:
        first = run.first
        while first < run.end:
            end = min(run.end, (first // boundary + 1) * boundary)
            yield Run(first, end - first)
            first = end


def total(runs: Iterable[Run]) -> int:
    """Bytes in all of them."""
    return sum(run.count for run in runs) * FRAME
