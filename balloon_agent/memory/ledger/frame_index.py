"""Which frames are held, and by which owner: an index by place. Pure bookkeeping.

The address space is divided into chunks of 64 MiB. A run is cut where it crosses from one to the next, and each piece of it is
one 64-bit word in the ascending list of its chunk. So a lookup costs the same whether the balloon holds 1 GiB or 1 TiB, an
insertion moves 128 KiB at worst, and a piece takes 8 bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from balloon_agent.frames import Run

# Of a word, from the top: where the piece begins in its chunk, how many frames it has less one, and whose it is.
_PLACE_BITS = 14
CHUNK = 1 << _PLACE_BITS
_OWNER_BITS = 64 - 2 * _PLACE_BITS
MOST_OWNERS = 1 << _OWNER_BITS
_BEGIN = _PLACE_BITS + _OWNER_BITS


def _pieces(runs: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """The runs cut into chunks: number of the chunk, first frame in it, count."""
    for first, count in runs:
        end = first + count
        while first < end:
            chunk, begin = divmod(first, CHUNK)
            length = min(end - first, CHUNK - begin)
            yield chunk, begin, length
            first += length


def _end(word: int) -> int:
    """The place in its chunk behind the last frame of a piece."""
    return (word >> _BEGIN) + ((word >> _OWNER_BITS) & (CHUNK - 1)) + 1


class Places:
    """Runs by their place, each with the number of its owner, below MOST_OWNERS. No frame is ever there twice."""

    def __init__(self) -> None:
        # Only chunks that have something in them.
        self._chunks: dict[int, array[int]] = {}

    def enter(self, runs: Sequence[Run], owner: int) -> None:
        """ValueError, and nothing changed, if any of the frames is there already, or twice among these."""
        for done, (chunk, begin, length) in enumerate(_pieces(runs)):
            words = self._chunks.get(chunk)
            if words is None:
                words = self._chunks[chunk] = array("Q")
            at = bisect_left(words, begin << _BEGIN)
            if self._meets(words, at, begin, begin + length):
                self._strike(islice(_pieces(runs), done))
                held = chunk * CHUNK + begin
                raise ValueError(f"frames {held:#x}..{held + length - 1:#x}, or some of them, are held already")
            words.insert(at, begin << _BEGIN | (length - 1) << _OWNER_BITS | owner)

    def strike(self, runs: Iterable[Run]) -> None:
        """Take runs out that were entered just so."""
        self._strike(_pieces(runs))

    def _strike(self, pieces: Iterable[tuple[int, int, int]]) -> None:
        for chunk, begin, _ in pieces:
            words = self._chunks[chunk]
            del words[bisect_left(words, begin << _BEGIN)]
            if not words:
                del self._chunks[chunk]

    @staticmethod
    def _meets(words: array[int], at: int, begin: int, end: int) -> bool:
        """Whether any piece has frames in ``begin``..``end``; ``at`` is where one from ``begin`` on would be inserted."""
        return (at > 0 and _end(words[at - 1]) > begin) or (at < len(words) and words[at] >> _BEGIN < end)

    def parts(self, size: int) -> set[int]:
        """Of parts of ``size`` frames, the numbers of those in which anything may be: to a chunk exactly."""
        return {part for chunk in self._chunks for part in range(chunk * CHUNK // size, ((chunk + 1) * CHUNK - 1) // size + 1)}

    def chunks(self) -> list[int]:
        """Numbers of the chunks that anything is in, ascending."""
        return sorted(self._chunks)

    def cells(self, chunk: int, size: int) -> Iterator[tuple[int, dict[int, int]]]:
        """Of memory in cells of ``size`` frames: the number of each that has anything in this chunk, and frames by owner.

        Ascending. To be used up before anything changes.
        """
        words = self._chunks.get(chunk, array("Q"))
        base = chunk * CHUNK
        behind = place = owner = 0  # the last piece's end, and its owner
        while place < CHUNK:
            cell = (base + place) // size
            until = min(CHUNK, (cell + 1) * size - base)
            frames: dict[int, int] = {}
            if behind > place:
                frames[owner] = min(behind, until) - place
            part = words[bisect_left(words, place << _BEGIN) : bisect_left(words, until << _BEGIN)]
            for word in part:
                owner = word & (MOST_OWNERS - 1)
                frames[owner] = frames.get(owner, 0) + (word >> _OWNER_BITS & (CHUNK - 1)) + 1
            if part:
                behind = _end(part[-1])
                frames[owner] -= max(0, behind - until)
            if frames:
                yield cell, frames
            place = until

    def owners(self, runs: Iterable[Run]) -> list[int]:
        """Those who have any frame of the runs, each once, ascending."""
        found: set[int] = set()
        for chunk, begin, length in _pieces(runs):
            words = self._chunks.get(chunk, ())
            at = bisect_left(words, begin << _BEGIN)
            if at > 0 and _end(words[at - 1]) > begin:
                at -= 1
            while at < len(words) and words[at] >> _BEGIN < begin + length:
                found.add(words[at] & (MOST_OWNERS - 1))
                at += 1
        return sorted(found)

    def longest(self) -> int:
        """Pieces in the fullest chunk: what the cost of everything here depends on, and nothing else. At most CHUNK."""
        return max(map(len, self._chunks.values()), default=0)
