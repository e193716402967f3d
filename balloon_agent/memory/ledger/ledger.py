"""The ledger: what the balloon holds. Pure bookkeeping, no I/O.

It is written before the host is told of an inflate and after it has acknowledged a deflate, so that at every instant the
frames which the host may discard are among those in the ledger. What a step costs here does not depend on how much is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from balloon_agent.frames import Run

from .by_size import Shelf
from .frame_index import Places
from .packed_runs import Runs


@dataclass(frozen=True, slots=True)
class Extent:
    """Memory that a source took in one piece, and gives back in one: its name, its runs, whose it is.

    ``runs`` may be given as any sequence, and are kept packed. ``holder`` names the process that owns it; None for a memory
    block, which is offline and no process's. ``size`` is in bytes.
    """

    name: str
    source: str
    runs: Sequence[Run]
    holder: str | None = None
    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        packed = self.runs if isinstance(self.runs, Runs) else Runs(self.runs)
        object.__setattr__(self, "runs", packed)
        object.__setattr__(self, "size", packed.size)


class Ledger:
    """Extents by name. No frame is ever in two of them."""

    def __init__(self) -> None:
        self._extents: dict[str, Extent] = {}
        self._size = 0
        self._shelves: dict[str, Shelf[Extent]] = {}  # by source; none is empty
        self._by_holder: dict[str, dict[str, Extent]] = {}  # none is empty
        self._held_by: dict[str, int] = {}
        # Frames are found by the number of their extent, which is free again when it is struck out.
        self._places = Places()
        self._numbers: dict[str, int] = {}
        self._numbered: list[str] = []
        self._free_numbers: list[int] = []

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents.values())

    def __len__(self) -> int:
        return len(self._extents)

    def __contains__(self, name: object) -> bool:
        return name in self._extents

    def __getitem__(self, name: str) -> Extent:
        return self._extents[name]

    @property
    def size(self) -> int:
        """Bytes held in all."""
        return self._size

    def by_source(self) -> dict[str, int]:
        """Bytes held by each source that holds any."""
        return {source: shelf.total for source, shelf in self._shelves.items()}

    @property
    def in_use(self) -> int:
        """Bytes that holders have: what the guest's kernel believes to be in use, and not offline."""
        return sum(self._held_by.values())

    def parts(self, size: int) -> set[int]:
        """Of memory in parts of ``size`` frames, the numbers of those in which anything is held, or very near."""
        return self._places.parts(size)

    def chunks(self) -> list[int]:
        """Numbers of the chunks of memory (``places.CHUNK`` frames each) in which anything is held, ascending."""
        return self._places.chunks()

    def cells(self, chunk: int, size: int) -> Iterator[tuple[str, int, int]]:
        """What is held in a chunk, by cells of ``size`` frames, ascending: source, number of the cell, and frames in both.

        The ledger must not be changed meanwhile.
        """
        for cell, owners in self._places.cells(chunk, size):
            for owner, frames in owners.items():
                yield self._extents[self._numbered[owner]].source, cell, frames

    def overlapping(self, runs: Sequence[Run]) -> list[Extent]:
        """The extents that hold any frame of these runs, each once; there should be none."""
        return [self._extents[self._numbered[number]] for number in self._places.owners(runs)]

    def add(self, extent: Extent) -> None:
        """Enter an extent. ValueError, and nothing changed, if its name or any of its frames is there already.

        Also if a frame is in two of its own runs.
        """
        if extent.name in self._extents:
            raise ValueError(f"extent {extent.name} is in the ledger already")
        number = self._free_numbers[-1] if self._free_numbers else len(self._numbered)
        try:
            self._places.enter(extent.runs, number)
        except ValueError as error:
            raise ValueError(f"extent {extent.name}: {error}") from None
        if self._free_numbers:
            self._numbered[self._free_numbers.pop()] = extent.name
        else:
            self._numbered.append(extent.name)
        self._numbers[extent.name] = number
        self._extents[extent.name] = extent
        self._size += extent.size
        self._shelves.setdefault(extent.source, Shelf()).put(extent)
        if extent.holder is not None:
            self._by_holder.setdefault(extent.holder, {})[extent.name] = extent
            self._held_by[extent.holder] = self._held_by.get(extent.holder, 0) + extent.size

    def remove(self, name: str) -> Extent:
        """Strike an extent out, and return it. KeyError if it is not there."""
        extent = self._extents.pop(name)
        self._places.strike(extent.runs)
        self._free_numbers.append(self._numbers.pop(name))
        self._size -= extent.size
        shelf = self._shelves[extent.source]
        shelf.take(extent)
        if shelf.is_empty():
            del self._shelves[extent.source]
        if extent.holder is not None:
            self._held_by[extent.holder] -= extent.size
            owned = self._by_holder[extent.holder]
            del owned[name]
            if not owned:
                del self._by_holder[extent.holder], self._held_by[extent.holder]
        return extent

    def of_holder(self, holder: str) -> list[Extent]:
        """What a holder owns, the earliest first."""
        return list(self._by_holder.get(holder, {}).values())

    def held_by(self, holder: str) -> int:
        """Bytes that a holder owns."""
        return self._held_by.get(holder, 0)

    def fitting(self, size: int, source: str) -> list[Extent]:
        """Extents of one source, of ``size`` bytes together at most: always the largest that still fits."""
        shelf = self._shelves.get(source)
        return [] if shelf is None else list(shelf.fitting(size))

    def choose(self, size: int, order: Sequence[str]) -> list[Extent]:
        """Extents to give back for ``size`` bytes: source by source in ``order``, none larger than what is left of ``size``.

        Within a source always the largest that still fits, so that there are few to give back, and of equal ones the latest.
        Where every single one is larger than ``size``, the smallest of the first source that holds anything: the rest of it is
        to be taken again. Empty only for an empty ledger or a size of 0.
        """
        return list(self.candidates(size, order))

    def candidates(self, size: int, order: Sequence[str]) -> Iterator[Extent]:
        """What ``choose`` returns, one by one: for who needs but the first few. The ledger must not be changed meanwhile."""
        if size <= 0 or not self._shelves:
            return
        sources = [source for source in order if source in self._shelves]
        sources += [source for source in self._shelves if source not in sources]
        fits = False
        left = size
        for source in sources:
            for extent in self._shelves[source].fitting(left):
                fits = True
                left -= extent.size
                yield extent
        if not fits:
            yield self._shelves[sources[0]].smallest()


def runs_of(extents: Iterable[Extent]) -> list[Run]:
    """All runs of the extents, in order."""
    return sorted((run for extent in extents for run in extent.runs), key=itemgetter(0))
