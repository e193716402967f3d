"""Others who bring memory blocks online while those are in the balloon: how often, and how long blocks rest for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from balloon_agent.linux.memory_blocks import names

# So many blocks within so many seconds: after that all blocks rest.
MOST_INTRUSIONS, INTRUSIONS_WITHIN = 3, 60.0
# The first rest in seconds, and the longest. Each is twice the one before.
FIRST_REST, LONGEST_REST = 60.0, 3600.0


class Intrusions:
    """Blocks that were brought online by others. Now and then does not matter; insisting means that no block is taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: list[tuple[float, int]] = []
        self._rests_until = -math.inf
        self._rest = FIRST_REST
        self._why = ""

    def note(self, numbers: Iterable[int]) -> bool:
        """These blocks were brought online by others. Returns whether a rest begins with that."""
        now = self._clock()
        self._seen = [(when, number) for when, number in self._seen if when > now - INTRUSIONS_WITHIN]
        self._seen += [(now, number) for number in numbers]
        if len(self._seen) < MOST_INTRUSIONS or now < self._rests_until:
            return False
        self._rests_until = now + self._rest
        self._rest = min(2 * self._rest, LONGEST_REST)
        self._why = (
            "no blocks are taken for now, since somebody else brings them online again and again "
            f"({names(sorted({number for _, number in self._seen}))}): balloon-agent doctor names udev rules that do so"
        )
        return True

    @property
    def insistence(self) -> str | None:
        """Why no block is to be taken for now, in words; None if nothing is against it."""
        return self._why if self._clock() < self._rests_until else None
