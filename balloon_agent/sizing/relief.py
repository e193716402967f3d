"""Pressure relief: how far the balloon shrinks when the guest runs short of memory, for how long, and how it grows again.

Pure: it is told the time, and what the guest can spare; it says how large the balloon may be. It gives back much at once, since
a program that has begun to need memory will mostly need more, and takes back little at a time, and later each time that turned
out to be too early.
"""

from __future__ import annotations

import math

# Bytes given back at least, and taken back at most, in one go: a memory block's worth.
PIECE = 128 << 20
# The share of the reserve that must be left: inflating stops at the reserve, and what little a guest uses then is no need.
LEFT = 3, 4
# Seconds without need before memory is taken back, at first. Twice as long whenever it was too early, up to so many times.
COOLDOWN, LONGEST = 10.0, 32
# Then a piece is taken, every so many cooldowns; where there is none to be had, that is looked for ever more rarely.
REGROWTH, LONGEST_REGROWTH = 0.2, 3.2
# The kernel tells of the first need only: while it lasts one has to look, so often, and so long after the last sign of it.
CLOSE_LOOK, CLOSE_LOOKS_FOR = 0.02, 1.0


class Relief:
    """``reserve`` is what inflating leaves, in bytes: with much less than that the guest is in need.

    ``cap`` is the size that the balloon may have, if any, in bytes.

    ``cooldown`` is in seconds. If it does not ``shrink``, need only keeps the balloon from growing after a loss, or while it
    was about to.
    """

    def __init__(self, reserve: int, cooldown: float = COOLDOWN, *, shrinks: bool = True) -> None:
        self.reserve = reserve
        self._shrinks = shrinks
        self._first = cooldown
        self.cap: int | None = None
        self.count = 0
        self._cooldown = cooldown
        self._interval = REGROWTH * cooldown
        self._last_need = self._relieved_at = -math.inf
        self._grow_at = math.inf
        self._grown_at = -math.inf

    def set(self, reserve: int, cooldown: float) -> None:
        """As at the construction."""
        self.reserve = reserve
        if cooldown != self._first:
            self._first = self._cooldown = cooldown
            self._interval = REGROWTH * cooldown

    def lose(self, now: float, actual: int) -> None:
        """What the balloon had, or was about to get, has gone to who needs it: with ``actual`` bytes it should not grow now."""
        self._note_need(now)
        self.cap = actual if self.cap is None else min(self.cap, actual)

    @property
    def line(self) -> int:
        """Bytes that the guest must be able to spare: with less it is in need."""
        share, of = LEFT
        return self.reserve * share // of

    @property
    def active(self) -> bool:
        """Whether the balloon is kept smaller than it should be."""
        return self.cap is not None

    def look(self, now: float, spare: int, actual: int, wanted: int, least: int = 0) -> None:
        """Take in what the guest can spare. The balloon has ``actual`` bytes, and but for this it should have ``wanted``.

        ``least`` is what it must have, whatever the guest needs.
        """
        if spare < self.line:
            self._need(now, spare, actual, least)
        elif self.cap is not None and now >= self._grow_at:
            self._grow(now, spare, actual, wanted)
        elif self.cap is not None and not self._growing:
            # What went back beyond what was needed, because a block cannot be divided, is not taken again at once.
            self.cap = min(self.cap, actual)

    @property
    def _growing(self) -> bool:
        return self._grown_at > self._last_need

    def _note_need(self, now: float) -> None:
        if self._growing and now - self._grown_at < 2 * self._cooldown:
            # Too early. Who needs memory now and then finds the balloon small half of the time at most.
            self._cooldown = min(self._cooldown * 2, self._first * LONGEST)
        elif now - self._last_need > self._first * LONGEST:
            self._cooldown = self._first
        self._last_need = now
        self._grow_at = now + self._cooldown

    def _need(self, now: float, spare: int, actual: int, least: int) -> None:
        self._note_need(now)
        if self.cap is not None and actual > self.cap:
            return  # on its way
        if actual > least and self._shrinks:
            self.cap = max(least, actual - max(PIECE, 2 * self.reserve - spare))
            self._relieved_at = now
            self.count += 1

    def _grow(self, now: float, spare: int, actual: int, wanted: int) -> None:
        self._grow_at = now + self._interval
        if actual >= wanted:
            # Less is wanted by now.
            self.cap = None
            return
        if spare - self.reserve < min(PIECE, wanted - actual):
            self._interval = min(self._interval * 2, self._first * LONGEST_REGROWTH)
            return
        self._interval = REGROWTH * self._first
        self._grow_at = now + self._interval
        self._grown_at = now
        cap = min(actual, self.cap if self.cap is not None else actual) + PIECE
        self.cap = cap if cap < wanted else None

    def pause(self, now: float) -> float | None:
        """In how many seconds to look again; None if nothing but a sign of need calls for it."""
        if self.cap is None:
            return None
        if now < self._relieved_at + CLOSE_LOOKS_FOR:
            return CLOSE_LOOK
        return max(0.0, self._grow_at - now)
