"""Many runs in little room: 16 bytes each, where a tuple of ``Run`` needs some 140."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

from balloon_agent.frames import FRAME, Run, unchecked


class Runs(Sequence[Run]):
    """An immutable sequence of runs, in the order given; equal to any other sequence of the same runs.

    The runs are made anew each time one is asked for, so that none outlives its use.
    """

    __slots__ = ("_words",)

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        # First frame and count of each in turn.
        self._words = array("Q", chain.from_iterable(runs))

    @property
    def size(self) -> int:
        """Bytes in all of them. Counted anew each time."""
        return sum(self._words[1::2]) * FRAME

    def __len__(self) -> int:
        return len(self._words) // 2

    def __iter__(self) -> Iterator[Run]:
        words = iter(self._words)
        # They were valid runs when they came: not checked again.
        return map(unchecked, zip(words, words, strict=True))

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> Runs: ...

    def __getitem__(self, index: int | slice) -> Run | Runs:
        places = range(0, len(self._words), 2)[index]
        if isinstance(places, range):
            return Runs(self._at(place) for place in places)
        return self._at(places)

    def _at(self, place: int) -> Run:
        return unchecked(self._words[place : place + 2])

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, Runs):
            return self._words == other._words
        if isinstance(other, Sequence):
            return tuple(self) == tuple(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Runs({list(self)})"
