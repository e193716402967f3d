"""Telling the host of extents: as few runs as there can be, none across a boundary, and not too much at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from balloon_agent.frames import (
    FRAME,
    Run,
    join,
    split,
)
from balloon_agent.memory.ledger.ledger import Extent, runs_of

# Bytes that a host is told of at once: it may have to free all of them before the vCPU goes on.
POST = 512 << 20


class Host(Protocol):
    """The side of the device that this package needs."""

    def inflate(self, runs: Sequence[Run]) -> None: ...

    def deflate(self, runs: Sequence[Run]) -> None: ...

    def set_actual(self, size: int) -> None: ...

    @property
    def at_once(self) -> int:
        """Bytes that one notification names at most."""
        ...

    @property
    def deflates_on_oom(self) -> bool: ...

    @property
    def bears_loss(self) -> bool: ...


@dataclass(frozen=True)
class Told:
    """Extents by what became of them: the host was told of the ``whole``; of what was not ours any more it was ``unsaid``.

    ``doubtful`` is what was the guest's when the host had answered: it may have been so when the host discarded it.
    """

    whole: list[Extent]
    unsaid: list[Extent]
    doubtful: list[Extent]


class Posting:
    """``boundary`` is how many frames no run may cross a multiple of; ``cuts`` are further frames that none may cross."""

    def __init__(
        self,
        host: Host,
        boundary: int,
        cuts: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._boundary = boundary
        self._cuts = cuts
        self._clock = clock
        self.seconds = 0.0

    def inflate(self, extents: Sequence[Extent], is_ours: Callable[[Extent], bool]) -> Told:
        """Returns after the host's acknowledgement; DeviceFailed without one.

        ``is_ours`` is asked of each extent right before every notification that names it, and right after its acknowledgement.
        """
        told = Told([], [], [])
        with self._timing():
            for batch in in_parts(extents, min(POST, self._host.at_once)):
                ours = [extent for extent in batch if is_ours(extent)]
                told.unsaid.extend(extent for extent in batch if extent not in ours)
                # Only an extent that is larger than a notification comes in several parts, and it comes alone.
                for part in self._parts(ours):
                    self._host.inflate(part)
                    if doubtful := [extent for extent in ours if not is_ours(extent)]:
                        told.doubtful.extend(doubtful)
                        break
                told.whole.extend(extent for extent in ours if extent not in told.doubtful)
        return told

    def deflate(self, extents: Sequence[Extent]) -> None:
        """Returns after the host's acknowledgement; DeviceFailed without one."""
        with self._timing():
            for part in self._parts(extents):
                self._host.deflate(part)

    def _parts(self, extents: Sequence[Extent]) -> Iterator[Sequence[Run]]:
        most = min(POST, self._host.at_once)
        runs = split(join(runs_of(extents)), self._boundary, self._cuts)
        return in_parts([*split(runs, most // FRAME)], most)

    @contextmanager
    def _timing(self) -> Iterator[None]:
        begin = self._clock()
        try:
            yield
        finally:
            self.seconds += self._clock() - begin


class Sized(Protocol):
    @property
    def size(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


def in_parts(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """The same runs or extents in groups of at most ``most`` bytes, and of one item at least. None for no items."""
    begin = size = 0
    for at, item in enumerate(items):
        if at > begin and size + item.size > most:
            yield items[begin:at]
            begin, size = at, 0
        size += item.size
    if begin < len(items):
        yield items[begin:]
