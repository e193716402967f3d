"""The extents of one source by their size, so that the next one to give back is found without a search."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What can be put on a shelf."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...


T = TypeVar("T", bound=Sized)


class Shelf(Generic[T]):
    """Things by size, and those of one size in the order they came. Their names are unique."""

    def __init__(self) -> None:
        self._by_size: dict[int, dict[str, T]] = {}
        self._sizes: list[int] = []  # the keys of _by_size, ascending
        self.total = 0  # bytes

    def put(self, thing: T) -> None:
        row = self._by_size.get(thing.size)
        if row is None:
            row = self._by_size[thing.size] = {}
            insort(self._sizes, thing.size)
        row[thing.name] = thing
        self.total += thing.size

    def take(self, thing: T) -> None:
        """KeyError if it is not there."""
        row = self._by_size[thing.size]
        if next(reversed(row)) == thing.name:
            # The usual way, the latest first. Unlike ``del`` it leaves no hole at the end for the next search to step over.
            row.popitem()
        else:
            del row[thing.name]
        self.total -= thing.size
        if not row:
            del self._by_size[thing.size]
            del self._sizes[bisect_left(self._sizes, thing.size)]

    def is_empty(self) -> bool:
        return not self._sizes

    def fitting(self, size: int) -> Iterator[T]:
        """Things of ``size`` bytes together at most: always the largest that still fits, of equal ones the latest."""
        at = bisect_right(self._sizes, size)
        while at > 0:
            each = self._sizes[at - 1]
            for thing in reversed(self._by_size[each].values()):
                if each > size:
                    break
                size -= each
                yield thing
            at = bisect_right(self._sizes, size, 0, at - 1)

    def smallest(self) -> T:
        """Of equal ones the latest. IndexError if the shelf is empty."""
        return next(reversed(self._by_size[self._sizes[0]].values()))
