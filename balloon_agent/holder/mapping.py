"""Where an extent is mapped in its holder, and what is behind that: who knows both can see whether it is still so."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from balloon_agent.frames import FRAME, Run, unchecked
from balloon_agent.linux.pagemap import MemoryGone, Pagemap


class Piece(NamedTuple):
    """``frames`` contiguous frames from ``first`` on, at ``address`` and what follows it."""

    address: int
    first: int
    frames: int


class Pieces:
    """Pieces of one mapping, which ascend and do not overlap. 24 bytes each: there can be very many."""

    __slots__ = ("_words",)

    def __init__(self, pieces: Iterable[Iterable[int]]) -> None:
        self._words = array("Q", chain.from_iterable(pieces))

    def __iter__(self) -> Iterator[Piece]:
        words = iter(self._words)
        return map(Piece._make, zip(words, words, words, strict=True))

    def runs(self) -> Iterator[Run]:
        """Their frames, in the order of their addresses."""
        # Checked when they were looked up.
        return map(unchecked, zip(self._words[1::3], self._words[2::3], strict=True))

    def are_in_place(self, pagemap: Pagemap, unit: int) -> bool:
        """Whether every frame is where it was. The process maps them in pages of ``unit`` bytes.

        MemoryGone if the process has no memory any more.
        """
        base = self._words[0]
        end = self._words[-3] + self._words[-1] * FRAME
        pages = unit // FRAME
        # In one look, holes and all: they lie close together, as they were taken.
        try:
            if unit == FRAME:
                firsts: list[int] | list[int | None] = pagemap.frames(base, (end - base) // FRAME)
            else:
                firsts = pagemap.huge_frames(base, (end - base) // unit, unit)
        except MemoryGone:
            raise
        except LookupError:
            return False
        words = iter(self._words)
        for address, first, frames in zip(words, words, words, strict=True):
            at = (address - base) // unit
            if firsts[at : at + frames // pages] != [*range(first, first + frames, pages)]:
                return False
        return True


def pieces_of(pages: Iterable[tuple[int, int]], unit: int) -> Pieces:
    """Pages of ``unit`` bytes, by address and first frame, in as few pieces as there can be. Their addresses ascend."""
    words: list[int] = []
    frames = unit // FRAME
    following = (-1, -1)
    for page in pages:
        if page == following:
            words[-1] += frames
        else:
            words += page
            words.append(frames)
        address, first = page
        following = (address + unit, first + frames)
    return Pieces([words])
