"""Telling the host of extents: as few runs as there can be, none across a boundary, and not too much at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from balloon_agent.memory.frames import Run, join, split
from balloon_agent.memory.ledger import Extent, runs_of

# Bytes that a host is told of at once: it may have to free all of them before the vCPU goes on.
POST = 512 << 20


class Host(Protocol):
    """The side of the device that this package needs."""

    def inflate(self, runs: Sequence[Run]) -> None: ...

    def deflate(self, runs: Sequence[Run]) -> None: ...

    def set_actual(self, size: int) -> None: ...

    @property
    def deflates_on_oom(self) -> bool: ...

    @property
    def bears_loss(self) -> bool: ...


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

    def inflate(self, extents: Sequence[Extent]) -> None:
        """Returns after the host's acknowledgement; DeviceFailed without one."""
        self._post(self._host.inflate, extents)

    def deflate(self, extents: Sequence[Extent]) -> None:
        """As ``inflate``."""
        self._post(self._host.deflate, extents)

    def _post(self, tell: Callable[[Sequence[Run]], None], extents: Sequence[Extent]) -> None:
        begin = self._clock()
        try:
            for batch in in_parts(self._postable(runs_of(extents)), POST):
                tell(batch)
        finally:
            self.seconds += self._clock() - begin

    def _postable(self, runs: Sequence[Run]) -> list[Run]:
        return list(split(join(runs), self._boundary, self._cuts))


def in_parts(runs: Sequence[Run], most: int) -> Iterator[Sequence[Run]]:
    """The same runs in groups of at most ``most`` bytes, and of one run at least. None for no runs."""
    begin = size = 0
    for at, run in enumerate(runs):
        if at > begin and size + run.size > most:
            yield runs[begin:at]
            begin, size = at, 0
        size += run.size
    if begin < len(runs):
        yield runs[begin:]
