"""The guest's need of memory, as the owner thread hears of it, and what follows for the balloon."""

from __future__ import annotations

import logging
import math
import select
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from balloon_agent.frames import FRAME

from .relief import (
    CLOSE_LOOK,
    CLOSE_LOOKS_FOR,
    PIECE,
    Relief,
)

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
# Direct reclaim gives thousands of signs a second. After the look that one has caused they are not polled for SHORTEST_SAMPLE,
# then for twice as long each time, up to CALM_SAMPLE, while they go on and no memory goes; and for so many seconds where the
# balloon may not shrink, whatever they say.
NOTHING_TO_GIVE = 1.0
# A descriptor that reports one of these is ready for ever, and tells nothing any more.
BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL
_log = logging.getLogger(__name__)


def sooner(*pauses: float | None) -> float | None:
    """The shortest; None if there is none."""
    return min((each for each in pauses if each is not None), default=None)


class Demand(Protocol):
    """Tells when memory may be wanted: a descriptor becomes readable."""

    @property
    def fds(self) -> Collection[int]: ...

    def consume(self) -> bool:
        """Take in all signs that there are. Whether there was any."""
        ...

    def drop(self, fds: Collection[int]) -> None:
        """Close descriptors that have failed: they are not among ``fds`` any more."""
        ...


class Need:
    """``spare`` tells how many bytes the guest can do without; ``demand`` when they may have become too few.

    Without that they are looked at time and again, if ``samples``; so they are while ``is_deaf`` says that it will not tell, as
    of the last time that ``spare`` was asked. ``stalls_fd`` has POLLPRI while processes wait for memory. ``free_hidden`` frees
    so many bytes that are neither used nor free, as far as it can in a moment: whether there may be more to spare then.
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
        free_hidden: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self.relief = relief
        self._spare = spare
        self._demand = demand
        self._stalls_fd = stalls_fd
        self._always_samples = samples
        self._is_deaf = is_deaf
        self._free_hidden = free_hidden
        self._spared = 0
        self._sample = SHORTEST_SAMPLE
        self._again_after = AGAIN_AFTER
        self._moved_at = self._close_until = -math.inf
        # When the last sign was looked into; until when others are not polled, and how long that was the last time.
        self._told_at = self._deaf_until = -math.inf
        self._deaf_for = SHORTEST_SAMPLE
        self._is_deaf_yet = False
        # A sign came while there was nothing to give.
        self._heard_in_vain = False
        # At once: the kernel may have given up long ago. Only of what tells of need it matters whether it will do so again.
        self._again_at = math.inf if demand is None else -math.inf
        # Whether there may be need: looked into before the next step.
        self._is_wanted = self._is_thrashing = False
        # Whether something has just been given up for it, or may have to be.
        self._gave_way = self._seems_to_press = False

    @property
    def _samples(self) -> bool:
        return self._always_samples or self._is_deaf()

    def signs(self, now: float, actual: int) -> Mapping[int, int]:
        """Descriptors to poll, and for which events. None if nothing is held, or a sign has just been looked into."""
        if not actual or now < self._deaf_until:
            return {}
        fds = dict.fromkeys(self._demand.fds if self._demand is not None else (), select.POLLIN)
        return fds if self._stalls_fd is None else {**fds, self._stalls_fd: select.POLLPRI}

    def hear(self, now: float, ready: Mapping[int, int]) -> None:
        """Take in what poll has found of each of the descriptors."""
        if self._demand is not None and (heard := ready.keys() & set(self._demand.fds)):
            # Also where nobody looks: the device may be out of order for now.
            self._deaf_until = now + SHORTEST_SAMPLE
            self._is_wanted |= self._demand.consume()
            if broken := {fd for fd in heard if ready[fd] & BROKEN}:
                self._drop(self._demand, broken)
        if self._stalls_fd is None or self._stalls_fd not in ready:
            return
        if ready[self._stalls_fd] & BROKEN:
            self._stalls_fd = None
            _log.warning("thrashing is not noticed any more: the trigger in /proc/pressure/memory has failed")
        # While the balloon moves, it is the reason.
        elif now >= self._moved_at + STALLS_AFTER:
            self._is_wanted = self._is_thrashing = True

    def _drop(self, demand: Demand, broken: Collection[int]) -> None:
        demand.drop(broken)
        if left := len(demand.fds):
            _log.warning("perf events have failed: need of memory is heard of by %d of %d yet", left, left + len(broken))
            return
        self._demand, self._again_at, self._always_samples = None, math.inf, True
        _log.warning("need of memory is looked for, since it cannot be heard of any more: the perf events have failed")

    def leeway(self) -> float:
        """Seconds until the guest can be in need at the soonest, asked time and again while memory is being taken.

        0 if it is by now: then what is being taken is given up. A little more than what was asked for is used for a moment, by
        the kernel and by who takes it: a need that is not great has to be there twice in a row.
        """
        try:
            spare = self._spare()
        except OSError as error:
            _log.debug("it cannot be told how much the guest can spare: %s", error)
            return SHORTEST_SAMPLE
        presses = spare < self.relief.line // 2 or (spare < self.relief.line and self._seems_to_press)
        self._seems_to_press = spare < self.relief.line
        self._gave_way |= presses
        return 0.0 if presses else max((spare - self.relief.line) / FASTEST_USE, SHORTEST_SAMPLE)

    def moved(self, now: float) -> None:
        """The balloon has moved, or tried to: that can make others wait, too."""
        self._moved_at = now

    def look(self, now: float, actual: int, wanted: int, least: int) -> bool:
        """If there is need, or was a while ago: how large may the balloon be? Whether the answer is another one now.

        It has ``actual`` bytes, without need it should have ``wanted``, and ``least`` it must have.
        """
        may_shrink = actual > least
        if self._heard_in_vain and may_shrink:
            self._heard_in_vain, self._is_wanted = False, True
        if self._is_deaf_yet and now >= self._deaf_until and self._demand is not None:
            # No need to be woken up once more for a sign that is there already.
            self._is_deaf_yet = False
            self._is_wanted |= self._demand.consume()
        is_again = now >= self._again_at
        is_due = is_again or now < self._close_until or self.relief.active or (self._samples and actual)
        self._seems_to_press = False
        if not (self._is_wanted or self._gave_way or is_due):
            return False
        was_told, self._is_wanted = self._is_wanted, False
        # Signs that came since are answered by this look.
        was_told |= self._demand is not None and self._demand.consume()
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
            # Less than that is urgent, and what the balloon gives back is there sooner.
            is_tight = self.relief.line // 2 <= self._spared < self.relief.line
            if is_tight and self._free_hidden(self.relief.reserve - self._spared):
                # The balloon need not shrink for that.
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
        if was_told:
            self._rest_ears(now, may_shrink, has_fallen)
        if was_told and may_shrink and spare < self.relief.reserve:
            # Not in need yet, perhaps: but of what follows the kernel tells only after it has had a rest.
            self._close_until = now + CLOSE_LOOKS_FOR
        if was_told or (is_again and has_fallen):
            self._look_again(now, AGAIN_AFTER)
        elif is_again and tight and self._again_after < LAST_AGAIN:
            self._look_again(now, 2 * self._again_after)
        # Down to where the guest is in need, a program that takes memory fast shall not come between two samples.
        slack = max(0, self._spared - self.relief.line)
        calm = SHORTEST_SAMPLE if has_fallen else min(2 * self._sample, CALM_SAMPLE)
        self._sample = min(max(slack / FASTEST_USE, calm if may_shrink else NOTHING_TO_GIVE), LONGEST_SAMPLE)
        self.relief.look(now, spare, actual, wanted, least)
        return self.relief.cap != before

    def _rest_ears(self, now: float, may_shrink: bool, has_fallen: bool) -> None:
        """A sign has been looked into: others are not polled for a while, and what they would tell the next look takes in."""
        is_first, self._told_at = now > self._told_at + CLOSE_LOOKS_FOR, now
        self._deaf_for = SHORTEST_SAMPLE if is_first or has_fallen else min(2 * self._deaf_for, CALM_SAMPLE)
        self._deaf_until = now + (self._deaf_for if may_shrink else NOTHING_TO_GIVE)
        self._heard_in_vain, self._is_deaf_yet = not may_shrink, True

    def _look_again(self, now: float, after: float) -> None:
        """In so many seconds, whether the kernel has given up by then."""
        self._again_after, self._again_at = after, now + after

    def pause(self, now: float, actual: int) -> float | None:
        """In how many seconds to look again; None if nothing but a sign calls for it."""
        pauses = [self.relief.pause(now)]
        if now < self._close_until:
            # No sooner than the next sign would be heard.
            pauses.append(max(CLOSE_LOOK, self._deaf_for) if now < self._deaf_until else CLOSE_LOOK)
        if now < self._deaf_until and actual:
            pauses.append(self._deaf_until - now)
        if self._again_at < math.inf and actual:
            pauses.append(max(0.0, self._again_at - now))
        pause = sooner(*pauses)
        if pause is not None:
            # Also where nothing can be learnt by looking: this thread does not spin.
            pause = max(pause, SHORTEST_SAMPLE)
        return sooner(pause, self._sample) if self._samples and actual else pause
