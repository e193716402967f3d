"""The ledger: what the balloon holds. Pure bookkeeping, no I/O.

It is written before the host is told of an inflate and after it has acknowledged a deflate, so that at every instant the
frames which the host may discard are among those in the ledger.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .frames import Run, total


@dataclass(frozen=True)
class Extent:
    """Memory that a source took in one piece, and gives back in one: its name, its runs, whose it is.

    ``holder`` names the process that owns it; None for a memory block, which is offline and no process's.
    """

    name: str
    source: str
    runs: tuple[Run, ...]
    holder: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return total(self.runs)


class Ledger:
    """Extents by name. No frame is ever in two of them."""

    def __init__(self) -> None:
        self._extents: dict[str, Extent] = {}
        # Runs of all extents, ascending: the neighbours of a new run tell whether it overlaps any.
        self._runs: list[Run] = []
        self._sizes: dict[str, int] = {}

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents.values())

    def __len__(self) -> int:
        return len(self._extents)

    def __contains__(self, name: object) -> bool:
        return name in self._extents

    @property
    def size(self) -> int:
        """Bytes held in all."""
        return sum(self._sizes.values())

    def by_source(self) -> dict[str, int]:
        """Bytes held by each source that holds any."""
        return {source: size for source, size in self._sizes.items() if size}

    def overlaps(self, run: Run) -> bool:
        """Whether any frame of the run is held."""
        at = bisect_left(self._runs, run)
        return (at > 0 and self._runs[at - 1].end > run.first) or (at < len(self._runs) and self._runs[at].first < run.end)

    def overlapping(self, runs: Sequence[Run]) -> list[Extent]:
        """The extents that hold any frame of these runs; there should be none, so that this is rarely a search."""
        if not any(self.overlaps(run) for run in runs):
            return []
        return [
            extent
            for extent in self
            if any(held.first < run.end and run.first < held.end for held in extent.runs for run in runs)
        ]

    def add(self, extent: Extent) -> None:
        """Enter an extent. ValueError, and nothing changed, if its name or any of its frames is there already."""
        if extent.name in self._extents:
            raise ValueError(f"extent {extent.name} is in the ledger already")
        entered: list[Run] = []
        for run in extent.runs:
            if self.overlaps(run):
                for done in entered:
                    self._runs.pop(bisect_left(self._runs, done))
                raise ValueError(f"extent {extent.name}: frames {run.first:#x}..{run.end - 1:#x} are held already")
            self._runs.insert(bisect_left(self._runs, run), run)
            entered.append(run)
        self._extents[extent.name] = extent
        self._sizes[extent.source] = self._sizes.get(extent.source, 0) + extent.size

    def remove(self, name: str) -> Extent:
        """Strike an extent out, and return it. KeyError if it is not there."""
        extent = self._extents.pop(name)
        for run in extent.runs:
            self._runs.pop(bisect_left(self._runs, run))
        self._sizes[extent.source] -= extent.size
        return extent

    def of_holder(self, holder: str) -> list[Extent]:
        """What a holder owns."""
        return [extent for extent in self if extent.holder == holder]

    def choose(self, size: int, finest_first: Sequence[str]) -> list[Extent]:
        """Extents to give back for ``size`` bytes: from the finest source first, the latest taken first, none too large.

        Where every single one is larger than ``size``, the smallest of the finest source: the rest of it is to be taken
        again. Empty only for an empty ledger or a size of 0.
        """
        rank = {source: position for position, source in enumerate(finest_first)}
        latest_first = list(reversed(self._extents.values()))
        candidates = sorted(latest_first, key=lambda extent: rank.get(extent.source, len(rank)))
        chosen: list[Extent] = []
        left = size
        for extent in candidates:
            if extent.size <= left:
                chosen.append(extent)
                left -= extent.size
        if not chosen and candidates and size > 0:
            chosen.append(min(candidates, key=lambda extent: (rank.get(extent.source, len(rank)), extent.size)))
        return chosen


def runs_of(extents: Iterable[Extent]) -> list[Run]:
    """All runs of the extents, in order."""
    return sorted(run for extent in extents for run in extent.runs)
