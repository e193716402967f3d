"""When single pages in the balloon are exchanged for huge ones: at rest, and more rarely each time that there are none."""

from __future__ import annotations

from collections.abc import Callable

from .balloon import Balloon

# Seconds at rest until the first try, and until the last one that follows in vain. Each is twice as long as the one before.
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 3600.0


class Coarsening:
    """The times at which ``balloon`` is to exchange memory. It is asked only at rest, and without anybody in need of memory."""

    def __init__(self, balloon: Balloon, clock: Callable[[], float]) -> None:
        self._balloon = balloon
        self._clock = clock
        self._pause = FIRST_PAUSE
        self._due: float | None = None
        # How often it was tried.
        self.tries = 0

    def begin_anew(self) -> None:
        """Something has changed: what was not to be had may be there now."""
        self._pause, self._due = FIRST_PAUSE, None

    def step(self) -> float | None:
        """Exchange some if it is time. Returns the seconds until the next step; None if there is nothing to exchange."""
        if not self._balloon.scattered:
            self.begin_anew()
            return None
        now = self._clock()
        if self._due is None:
            self._due = now + self._pause
        if now < self._due:
            return self._due - now
        self.tries += 1
        if self._balloon.coarsen():
            self.begin_anew()
            self._due = now
            return 0.0
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._due = now + self._pause
        return self._pause
