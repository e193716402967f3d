"""The guest's need of memory, as the owner thread hears of it, and what follows for the balloon."""

from __future__ import annotations

import logging
import math
import select
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from balloon_agent.memory.frames import FRAME
from balloon_agent.sizing.relief import CLOSE_LOOK, CLOSE_LOOKS_FOR, PIECE, Relief

# Stalls are heeded so many seconds after the balloon has moved.
STALLS_AFTER = 2.0
# So long after a sign it is looked whether there will be another one: mostly the kernel has tried to reclaim by then. While
# little is left it may go on trying: then each look comes twice as late as the one before, up to the last one.
AGAIN_AFTER, LAST_AGAIN = 1.5, 24.0
# Bytes: what is less is no movement.
MOVED = 1 << 20
# Where need cannot be heard of, it is looked for: as often as a program that takes so many bytes a second makes necessary.
FASTEST_USE, SHORTEST_SAMPLE, LONGEST_SAMPLE = 1 << 30, 0.02, 5.0
# But as seldom as this, even where little is left, while nothing moves.
CALM_SAMPLE = 0.2
_log = logging.getLogger(__name__)


class Demand(Protocol):
    """Tells when memory may be wanted: a descriptor becomes readable."""

    @property
    def fds(self) -> Iterable[int]: ...

    def consume(self) -> None: ...


class Need:
    """``spare`` tells how many bytes the guest can do without; ``demand`` when they may have become too few.

    Without that they are looked at time and again, if ``samples``; so they are while ``is_deaf`` says that it will not tell, as
    of the last time that ``spare`` was asked. ``stalls_fd`` has POLLPRI while processes wait for memory.
    """

    def __init__(
        self,
        relief: Relief,
        spare: Callable[[], int],
        demand: Demand | None = None,
        stalls_fd: int | None = None,
        *,
        samples: bool = False,
        is_deaf: Callable[[], bool] = lambda: False,
    ) -> None:
        self.relief = relief
        self._spare = spare
        self._demand = demand
        self._stalls_fd = stalls_fd
        self._always_samples = samples
        self._is_deaf = is_deaf
        self._spared = 0
        self._sample = SHORTEST_SAMPLE
        self._again_after = AGAIN_AFTER
        self._moved_at = self._close_until = -math.inf
        # At once: the kernel may have given up long ago. Only of what tells of need it matters whether it will do so again.
        self._again_at = math.inf if demand is None else -math.inf
        # Whether there may be need: looked into before the next step.
        self._is_wanted = self._is_thrashing = False
        # Whether something has just been given up for it, or may have to be.
        self._gave_way = self._seems_to_press = False

    @property
    def _samples(self) -> bool:
        return self._always_samples or self._is_deaf()

    def signs(self, actual: int) -> Mapping[int, int]:
        """Descriptors to poll, and for which events. None while there is nothing to give."""
        if not actual:
            return {}
        fds = dict.fromkeys(self._demand.fds if self._demand is not None else (), select.POLLIN)
        return fds if self._stalls_fd is None else {**fds, self._stalls_fd: select.POLLPRI}

    def hear(self, now: float, ready: set[int]) -> None:
        """Take in which of the descriptors have something to tell."""
        if self._demand is not None and ready & set(self._demand.fds):
            self._demand.consume()
            self._is_wanted = True
        # While the balloon moves, it is the reason.
        if self._stalls_fd in ready and now >= self._moved_at + STALLS_AFTER:
            self._is_wanted = self._is_thrashing = True

    def presses(self) -> bool:
        """Whether the guest is in need by now, asked time and again while memory is being taken: then that is given up.

        A little more than what was asked for is used for a moment, by the kernel and by who takes it: a need that is not great
        has to be there twice in a row.
        """
        try:
            spare = self._spare()
        except OSError as error:
            _log.debug("it cannot be told how much the guest can spare: %s", error)
            return False
        presses = spare < self.relief.line // 2 or (spare < self.relief.line and self._seems_to_press)
        self._seems_to_press = spare < self.relief.line
        self._gave_way |= presses
        return presses

    def moved(self, now: float) -> None:
        """The balloon has moved, or tried to: that can make others wait, too."""
        self._moved_at = now

    def look(self, now: float, actual: int, wanted: int, least: int) -> bool:
        """If there is need, or was a while ago: how large may the balloon be? Whether the answer is another one now.

        It has ``actual`` bytes, without need it should have ``wanted``, and ``least`` it must have.
        """
        is_again = now >= self._again_at
        is_due = is_again or now < self._close_until or self.relief.active or (self._samples and actual)
        self._seems_to_press = False
        if not (self._is_wanted or self._gave_way or is_due):
            return False
        was_told, self._is_wanted = self._is_wanted, False
        thrashing, self._is_thrashing = self._is_thrashing, False
        before, spared_before = self.relief.cap, self._spared
        if self._gave_way:
            # What was given up has helped, perhaps so much that nothing shows any more.
            self._gave_way, was_told = False, True
            self.relief.lose(now, actual)
        if is_again:
            self._again_at = math.inf
        try:
            self._spared = self._spare()
        except OSError as error:
            _log.debug("it cannot be told how much the guest can spare: %s", error)
            # What it was told of is still to be looked into.
            self._is_wanted, self._is_thrashing = was_told, thrashing
            self._look_again(now, AGAIN_AFTER)
            return False
        has_fallen = self._spared + MOVED <= spared_before
        # What thrashes needs more than it has, if there is not plenty: then it is short of something else, of a cgroup's limit
        # perhaps, which more memory would not change.
        tight = self._spared < self.relief.reserve + PIECE
        spare = min(self._spared, self.relief.line - FRAME) if thrashing and tight else self._spared
        if was_told and spare < self.relief.reserve:
            # Not in need yet, perhaps: but of what follows the kernel tells only after it has had a rest.
            self._close_until = now + CLOSE_LOOKS_FOR
        if was_told or (is_again and has_fallen):
            self._look_again(now, AGAIN_AFTER)
        elif is_again and tight and self._again_after < LAST_AGAIN:
            self._look_again(now, 2 * self._again_after)
        # Down to where the guest is in need, a program that takes memory fast shall not come between two samples.
        slack = max(0, self._spared - self.relief.line)
        calm = SHORTEST_SAMPLE if has_fallen else min(2 * self._sample, CALM_SAMPLE)
        self._sample = min(max(slack / FASTEST_USE, calm), LONGEST_SAMPLE)
        self.relief.look(now, spare, actual, wanted, least)
        return self.relief.cap != before

    def _look_again(self, now: float, after: float) -> None:
        """In so many seconds, whether the kernel has given up by then."""
        self._again_after, self._again_at = after, now + after

    def pause(self, now: float, actual: int) -> float | None:
        """In how many seconds to look again; None if nothing but a sign calls for it."""
        pause = self.relief.pause(now)
        if now < self._close_until:
            pause = CLOSE_LOOK if pause is None else min(pause, CLOSE_LOOK)
        if self._again_at < math.inf and actual:
            again = max(0.0, self._again_at - now)
            pause = again if pause is None else min(pause, again)
        if pause is not None:
            # Also where nothing can be learnt by looking: this thread does not spin.
            pause = max(pause, SHORTEST_SAMPLE)
        if not self._samples or not actual:
            return pause
        return self._sample if pause is None else min(pause, self._sample)
