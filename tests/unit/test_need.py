"""When the agent looks at what the guest can spare, and when it sleeps."""

from __future__ import annotations

import errno
import itertools
import select
from collections.abc import Callable, Collection

import pytest

from balloon_agent.sizing.pressure import (
    AGAIN_AFTER,
    CALM_SAMPLE,
    FASTEST_USE,
    LAST_AGAIN,
    LONGEST_SAMPLE,
    MOVED,
    NOTHING_TO_GIVE,
    SHORTEST_SAMPLE,
    Need,
)
from balloon_agent.sizing.relief import (
    CLOSE_LOOK,
    CLOSE_LOOKS_FOR,
    COOLDOWN,
    PIECE,
    Relief,
)

MIB = 1 << 20
RESERVE = 64 * MIB
HELD = 700 * MIB
PLENTY = 1 << 40
SIGN = 3


class Demand:
    """Some descriptors, by numbers that nobody polls."""

    def __init__(self) -> None:
        self.open = {SIGN, SIGN + 1}
        self.has_news = False

    @property
    def fds(self) -> Collection[int]:
        return self.open

    def consume(self) -> bool:
        had_news, self.has_news = self.has_news, False
        return had_news

    def drop(self, fds: Collection[int]) -> None:
        self.open.difference_update(fds)


class Watch:
    """A guest with ``actual`` bytes in the balloon, ``spare`` bytes to spare, and an agent that only watches it."""

    def __init__(self, spare: int, *, actual: int = HELD, hears: bool = True, samples: bool = False) -> None:
        self.now = 100.0
        self.spare = spare
        self.error: OSError | None = None
        self.actual, self.least = actual, 0
        self.demand = Demand()
        # Whether its kernel has given up, and what was seen of that.
        self.has_given_up = self.is_deaf = False
        self.looks: list[float] = []
        relief = Relief(RESERVE, shrinks=hears or samples)
        # Bytes that hide, and those of them that a look frees.
        self.hidden, self.at_once = 0, 40 * MIB
        self.need = Need(
            relief,
            self._spare,
            self.demand if hears else None,
            samples=samples,
            is_deaf=lambda: self.is_deaf,
            free_hidden=self._free_hidden,
        )
        self.pause: float | None = 0.0

    def _spare(self) -> int:
        self.looks.append(self.now)
        if self.error is not None:
            raise self.error
        self.is_deaf = self.has_given_up
        return self.spare

    def _free_hidden(self, wanted: int) -> bool:
        assert wanted > RESERVE // 4, "nobody is in need"
        freed = min(self.hidden, self.at_once)
        self.hidden -= freed
        self.spare += freed
        return freed > 0

    def turn(self, *, sign: bool = False) -> None:
        self.demand.has_news |= sign
        self.need.hear(self.now, {SIGN: select.POLLIN} if sign else {})
        self.need.look(self.now, self.actual, HELD, self.least)
        self.pause = self.need.pause(self.now, self.actual)

    def run(self, seconds: float) -> list[float]:
        """Let so much time pass. When it looked, counted from now."""
        begin, end, seen = self.now, self.now + seconds, len(self.looks)
        while self.pause is not None and self.now + self.pause <= end:
            self.now += self.pause
            self.turn()
        if self.pause is not None:
            self.pause -= end - self.now
        self.now = end
        return [look - begin for look in self.looks[seen:]]

    def reclaim(self, seconds: float, seen: Callable[[], int] | None = None) -> int:
        """Let the kernel reclaim for so long, with a sign whenever one is polled. How many turns that takes, of 0.5 ms each."""
        end, turns = self.now + seconds, 0
        while self.now < end:
            self.spare = self.spare if seen is None else seen()
            polled = SIGN in self.need.signs(self.now, self.actual)
            self.now += 0.0005 if polled or self.pause is None else self.pause
            self.demand.has_news = True
            self.turn(sign=polled)
            turns += 1
        return turns

    @property
    def reliefs(self) -> int:
        return self.need.relief.count


def test_it_looks_once_at_the_start_and_then_waits_for_a_sign() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    assert (len(watch.looks), watch.pause) == (1, None)
    watch.turn(sign=True)
    assert watch.run(3600) == [AGAIN_AFTER]
    assert watch.pause is None


def test_a_kernel_that_had_given_up_before_the_agent_came_is_noticed() -> None:
    """With a balloon that an earlier agent has left, of which nothing is to be changed."""
    watch = Watch(RESERVE + 100 * MIB)
    watch.has_given_up = True
    watch.turn()
    assert watch.pause is not None
    watch.spare = RESERVE // 2
    assert len(watch.run(LONGEST_SAMPLE)) > 0
    assert watch.reliefs == 1


def test_what_hides_is_freed_before_the_balloon_shrinks_for_who_needs_memory() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    watch.hidden = 100 * MIB
    for left in (60 * MIB, 20 * MIB):
        watch.spare = RESERVE // 2
        watch.turn(sign=True)
        assert (watch.hidden, watch.reliefs) == (left, 0)
    # Splitting takes too long where memory is urgent.
    watch.spare = RESERVE // 4
    watch.turn(sign=True)
    assert (watch.hidden, watch.reliefs) == (20 * MIB, 1)


def test_where_what_hides_is_not_enough_the_balloon_shrinks() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    watch.hidden = MIB
    watch.spare = RESERVE // 2
    watch.turn(sign=True)
    assert (watch.hidden, watch.reliefs) == (0, 1)


def test_with_an_empty_balloon_it_sleeps_whatever_the_kernel_does() -> None:
    watch = Watch(RESERVE // 2, actual=0)
    watch.has_given_up = True
    watch.turn()
    assert watch.pause is None
    watch.turn(sign=True)
    assert len(watch.run(3600)) <= 2 * CLOSE_LOOKS_FOR / CLOSE_LOOK
    assert watch.pause is None


@pytest.mark.parametrize("shrinks", [True, False])
def test_what_gave_way_does_not_grow_before_it_has_cooled_down(shrinks: bool) -> None:
    """Though what was given up is there again by the time that anybody looks."""
    watch = Watch(RESERVE * 3 // 4, samples=False, hears=shrinks)
    assert watch.need.leeway() > 0
    watch.turn()
    assert not watch.need.relief.active
    watch.spare = RESERVE // 4
    assert watch.need.leeway() == 0
    watch.spare = RESERVE * 8
    # Asked again, of something else that was given up after it.
    assert watch.need.leeway() > 0
    watch.turn()
    assert watch.need.relief.cap == watch.actual
    assert watch.pause is not None
    watch.run(COOLDOWN / 2)
    assert watch.need.relief.cap == watch.actual
    watch.actual = HELD - 1
    watch.run(2 * COOLDOWN)
    assert not watch.need.relief.active


def test_a_need_that_is_not_great_has_to_be_there_twice() -> None:
    """Who takes memory needs a little more than that for a moment: it shall not give way to itself."""
    watch = Watch(RESERVE // 2)
    assert [watch.need.leeway(), watch.need.leeway()] == [SHORTEST_SAMPLE, 0.0]
    watch.turn()
    # Each step of the balloon for itself.
    assert watch.need.leeway() > 0
    watch.turn()
    assert watch.need.leeway() > 0
    watch.spare = RESERVE
    assert watch.need.leeway() > 0
    watch.spare = RESERVE // 2
    assert [watch.need.leeway(), watch.need.leeway()] == [SHORTEST_SAMPLE, 0.0]


def test_the_more_there_is_the_more_rarely_it_is_looked_whether_there_is_need() -> None:
    """A look costs as much as moving hundreds of pages, and no program uses memory faster than FASTEST_USE."""
    watch = Watch(RESERVE + FASTEST_USE // 2)
    assert watch.need.leeway() == pytest.approx(0.5 + (RESERVE - watch.need.relief.line) / FASTEST_USE)
    watch.spare = RESERVE // 2 + 1
    assert watch.need.leeway() == SHORTEST_SAMPLE


def test_nobody_gives_way_where_it_cannot_be_told_whether_there_is_need() -> None:
    watch = Watch(RESERVE // 4)
    watch.error = OSError(errno.EMFILE, "Too many open files")
    assert watch.need.leeway() > 0
    watch.error = None
    assert watch.need.leeway() == 0


def test_what_follows_a_sign_is_seen_within_a_close_look() -> None:
    watch = Watch(RESERVE - MIB)
    watch.turn()
    watch.turn(sign=True)
    assert watch.reliefs == 0
    watch.run(CLOSE_LOOKS_FOR / 2)
    watch.spare = RESERVE // 2
    watch.run(2 * CLOSE_LOOK)
    assert watch.reliefs == 1


@pytest.mark.parametrize("spare", [RESERVE - MIB, RESERVE + PIECE - MIB])
def test_while_little_is_left_it_looks_ever_more_rarely_whether_the_kernel_has_given_up(spare: int) -> None:
    watch = Watch(spare)
    watch.turn()
    watch.run(3600)
    watch.turn(sign=True)
    looks = [look for look in watch.run(3600) if look > CLOSE_LOOKS_FOR + CLOSE_LOOK]
    gaps = [after - before for before, after in zip([0.0, *looks], looks, strict=False)]
    assert gaps == pytest.approx([AGAIN_AFTER * 2**n for n in range(len(gaps))])
    assert gaps[-1] == pytest.approx(LAST_AGAIN)
    assert watch.pause is None
    # It is as new after a sign, and gives up watching only for a kernel that has not.
    watch.has_given_up = True
    watch.turn(sign=True)
    assert watch.run(3600)
    assert watch.pause is not None


def test_as_long_as_memory_goes_it_goes_on_looking() -> None:
    """kswapd tells nothing while it runs, however long that is."""
    watch = Watch(PLENTY)
    watch.turn(sign=True)
    for spare in range(2000 * MIB, 1000 * MIB, -MOVED):
        watch.spare = spare
        assert watch.run(AGAIN_AFTER)
    watch.run(2 * AGAIN_AFTER)
    assert watch.pause is None


def test_while_the_kernel_has_given_up_samples_follow_what_is_left() -> None:
    watch = Watch(RESERVE + 1024 * MIB)
    watch.has_given_up = True
    watch.turn()
    assert watch.pause == pytest.approx(1.0, rel=0.1)
    watch.spare = RESERVE
    watch.run(2.0)
    # Nothing moves: an idle guest is not looked at fifty times a second, though little is left of it.
    looks = watch.run(60)
    assert 60 / CALM_SAMPLE - 2 <= len(looks) <= 60 / CALM_SAMPLE + 2
    # A program begins to take it.
    watch.run(CALM_SAMPLE)
    for _ in range(10):
        watch.spare -= MOVED
        watch.run(watch.pause or 0.0)
        assert watch.pause == SHORTEST_SAMPLE
    assert watch.reliefs == 0
    # Somebody else has reclaimed something.
    watch.has_given_up = False
    watch.run(60)
    assert watch.pause is None


def test_a_look_that_fails_is_made_again_and_the_sign_not_forgotten() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    watch.error = OSError(errno.ENOMEM, "no memory")
    watch.turn(sign=True)
    assert 0.0 < (watch.pause or 0.0) <= AGAIN_AFTER
    watch.error, watch.spare = None, RESERVE // 2
    watch.turn()
    assert watch.reliefs == 1


@pytest.mark.parametrize("failing", [False, True])
def test_who_does_not_shrink_the_balloon_does_not_look(failing: bool) -> None:
    watch = Watch(RESERVE // 2, hears=False)
    if failing:
        watch.error = OSError(errno.ENOENT, "no zoneinfo")
    watch.turn()
    assert (watch.looks, watch.pause) == ([], None)


def test_relief_is_over_when_less_is_wanted() -> None:
    relief = Relief(RESERVE)
    relief.look(0.0, RESERVE // 2, HELD, HELD)
    assert relief.cap is not None
    wanted = relief.cap
    # The host has lowered its target to just that; there is no more to spare than inflating leaves.
    relief.look(COOLDOWN, RESERVE - MIB, wanted, wanted)
    assert not relief.active
    assert relief.pause(COOLDOWN) is None


# -- signs that go on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [RESERVE // 4, RESERVE - MIB, PLENTY])
def test_signs_are_heard_once_a_second_where_nothing_can_be_given(spare: int) -> None:
    """Under direct reclaim there are thousands a second, and the balloon is at a target that it may not go below."""
    watch = Watch(spare)
    watch.least = HELD
    watch.turn()
    turns = watch.reclaim(60)
    assert turns <= 60 / NOTHING_TO_GIVE + 60 / AGAIN_AFTER + 2
    assert watch.reliefs == 0


@pytest.mark.parametrize("spare", [RESERVE - MIB, RESERVE + PIECE, PLENTY])
def test_signs_that_change_nothing_are_heard_ever_more_rarely(spare: int) -> None:
    """As of a guest that reads through a large file, with all of its caches to spare."""
    watch = Watch(spare)
    watch.turn()
    watch.reclaim(2 * CLOSE_LOOKS_FOR)
    assert watch.reclaim(60) <= 1.2 * 60 / CALM_SAMPLE


def test_while_memory_comes_and_goes_signs_are_heard_at_intervals() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    levels = itertools.cycle([RESERVE + 9 * MIB, RESERVE + 3 * MIB, RESERVE + 6 * MIB])
    assert watch.reclaim(60, lambda: next(levels)) <= 60 / SHORTEST_SAMPLE
    assert watch.reliefs == 0


def test_the_first_sign_is_looked_into_at_once_and_the_next_as_soon_as_memory_goes() -> None:
    watch = Watch(PLENTY)
    watch.turn()
    watch.reclaim(60)
    watch.run(10)
    assert SIGN in watch.need.signs(watch.now, HELD)
    watch.spare = RESERVE + PIECE
    watch.turn(sign=True)
    assert watch.looks[-1] == watch.now
    # A program takes 1 GiB in a second.
    heard = watch.now
    watch.reclaim(0.5, lambda: RESERVE + PIECE - int((watch.now - heard) * (1 << 30)))
    assert watch.reliefs >= 1
    assert next(look for look in watch.looks if look > heard) <= heard + SHORTEST_SAMPLE + 0.001


def test_a_sign_that_came_while_nothing_could_be_given_is_looked_into_when_it_can() -> None:
    watch = Watch(RESERVE // 4)
    watch.least = HELD
    watch.turn()
    watch.turn(sign=True)
    watch.run(CLOSE_LOOKS_FOR / 2)
    assert watch.reliefs == 0
    # The host asks for less.
    watch.least = 0
    watch.turn()
    assert watch.reliefs == 1


def test_signs_before_a_look_are_answered_by_it() -> None:
    watch = Watch(RESERVE - MIB)
    watch.turn()
    watch.turn(sign=True)
    watch.demand.has_news = True
    watch.run(2 * CLOSE_LOOK)
    assert not watch.demand.has_news


@pytest.mark.parametrize("event", [select.POLLERR, select.POLLHUP, select.POLLNVAL, select.POLLIN | select.POLLHUP])
def test_descriptors_that_have_failed_are_dropped_and_the_last_is_followed_by_samples(
    event: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(RESERVE + 1024 * MIB)
    watch.turn()
    watch.need.hear(watch.now, {SIGN: event})
    watch.run(10)
    assert set(watch.need.signs(watch.now, HELD)) == {SIGN + 1}
    assert watch.pause is None
    watch.need.hear(watch.now, {SIGN + 1: event})
    watch.turn()
    assert watch.need.signs(watch.now, HELD) == {}
    assert watch.pause is not None
    watch.spare = RESERVE // 2
    watch.run(LONGEST_SAMPLE)
    assert watch.reliefs == 1
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "perf events have failed",
        "need of memory is looked for, since it cannot be heard of any more",
    ]
