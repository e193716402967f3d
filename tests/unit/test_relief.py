"""Pressure relief: fast enough, far enough, without swinging, and back in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.sizing.relief import (
    CLOSE_LOOK,
    COOLDOWN,
    LONGEST,
    LONGEST_REGROWTH,
    PIECE,
    Relief,
)

LONGEST_COOLDOWN = COOLDOWN * LONGEST
LONGEST_INTERVAL = COOLDOWN * LONGEST_REGROWTH

MIB = 1 << 20
RESERVE = 64 * MIB


@dataclass
class Guest:
    """A guest with a balloon that moves at once, in steps of ``unit`` bytes, as Relief says."""

    total: int = 1024 * MIB
    used: int = 150 * MIB
    wanted: int = 700 * MIB
    actual: int = 700 * MIB
    unit: int = 2 * MIB
    now: float = 0.0
    starved: bool = False
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.relief = Relief(RESERVE)

    @property
    def spare(self) -> int:
        return self.total - self.used - self.actual

    def look(self) -> None:
        self.relief.look(self.now, self.spare, self.actual, self.wanted)
        goal = min(self.wanted, self.wanted if self.relief.cap is None else self.relief.cap)
        if goal < self.actual:
            self.actual = goal // self.unit * self.unit
        elif self.spare - RESERVE > 0:
            self.actual += min(goal - self.actual, self.spare - RESERVE) // self.unit * self.unit
        self.sizes.append(self.actual)

    def run(self, seconds: float) -> None:
        """Looks as often as Relief wants, and when there is need."""
        end = self.now + seconds
        while self.now < end:
            pause = self.relief.pause(self.now)
            if pause is None:
                self.now = end
                return
            self.now = min(end, self.now + max(pause, 0.001))
            self.look()

    def touch(self, size: int, piece: int = 16 * MIB) -> None:
        """A program uses memory piece by piece; the kernel tells when less than the reserve is left."""
        while size > 0:
            self.used += min(piece, size)
            size -= piece
            self.starved |= self.spare < 0
            if self.spare < RESERVE:
                self.look()
            self.now += 0.01


def test_growing_again_that_has_to_give_way_is_tried_ever_more_rarely() -> None:
    guest = Guest(actual=300 * MIB)
    relief = guest.relief
    relief.lose(guest.now, guest.actual)
    tries = []
    for _ in range(7):
        # There is enough, until it is taken.
        while relief.cap == guest.actual:
            guest.now += 1.0
            relief.look(guest.now, 400 * MIB, guest.actual, guest.wanted)
        tries.append(guest.now)
        guest.now += 0.5
        relief.lose(guest.now, guest.actual)
    gaps = [after - before for before, after in pairwise([0.0, *tries])]
    assert all(after >= min(2 * before, LONGEST_COOLDOWN) - 1 for before, after in pairwise(gaps)), gaps


def test_who_asks_for_memory_gets_it_in_time_and_the_balloon_returns() -> None:
    guest = Guest()
    guest.look()
    assert not guest.relief.active
    guest.touch(600 * MIB)
    assert not guest.starved
    assert guest.relief.count < 8
    assert guest.spare >= guest.relief.line
    low = guest.actual
    guest.run(3600)
    # The program has its memory still: what could be had again is little.
    assert guest.actual - low < 2 * PIECE
    assert guest.spare >= guest.relief.line
    assert guest.relief.active
    guest.used -= 600 * MIB
    guest.run(LONGEST_COOLDOWN + 60)
    assert guest.actual == guest.wanted
    assert not guest.relief.active
    assert guest.relief.pause(guest.now) is None


def test_without_need_nothing_is_given_back() -> None:
    """kswapd is woken up for more than want of memory."""
    guest = Guest(used=200 * MIB)
    for _ in range(100):
        guest.look()
        guest.now += 0.001
    assert guest.relief.count == 0
    assert guest.relief.pause(guest.now) is None


def test_what_inflating_left_may_be_used_a_little() -> None:
    """A balloon that stopped at the reserve does not shrink for the programs that ask it how it is."""
    guest = Guest(wanted=950 * MIB)
    while guest.spare > RESERVE:
        guest.look()
    stopped = guest.actual
    assert RESERVE - guest.unit < guest.spare <= RESERVE
    guest.touch(RESERVE // 4 - guest.unit, 1 * MIB)
    assert guest.relief.count == 0
    guest.touch(2 * guest.unit, 1 * MIB)
    assert guest.relief.count == 1
    assert guest.actual == stopped - PIECE


@given(st.sampled_from([4096, 2 * MIB, 128 * MIB]), st.integers(200, 900), st.integers(1, 64))
def test_it_comes_to_rest(unit: int, used: int, piece: int) -> None:
    """With a program that neither takes nor returns anything, the size stays after a while, and nobody looks all the time."""
    guest = Guest(unit=unit, actual=640 * MIB, wanted=640 * MIB)
    guest.touch((used - 150) * MIB, piece * MIB)
    guest.run(1000)
    seen = len(guest.sizes)
    guest.run(3600)
    # Without the look that the end of the run makes.
    settled = guest.sizes[seen:-1]
    assert len({*settled}) <= 2, "it swings"
    assert len(settled) <= 3600 / LONGEST_INTERVAL + 1


@given(st.lists(st.tuples(st.integers(-600, 600), st.floats(0.01, 600)), max_size=20))
def test_it_is_never_larger_than_wanted_and_gives_all_back_if_need_be(changes: list[tuple[int, float]]) -> None:
    guest = Guest()
    for change, seconds in changes:
        if change > 0:
            guest.touch(min(change * MIB, guest.total - guest.used - 100 * MIB))
        else:
            guest.used = max(100 * MIB, guest.used + change * MIB)
        guest.run(seconds)
        assert 0 <= guest.actual <= guest.wanted
        assert guest.actual == 0 or guest.spare >= 0 or guest.relief.active
    guest.used = 100 * MIB
    guest.run(2 * LONGEST_COOLDOWN)
    assert guest.actual == guest.wanted


def test_what_was_too_early_is_done_later_each_time() -> None:
    guest = Guest()
    times: list[float] = []
    for _ in range(4):
        guest.touch(400 * MIB)
        begin = guest.now
        guest.used -= 400 * MIB
        while guest.relief.active and guest.actual < guest.wanted:
            before = guest.actual
            guest.run(CLOSE_LOOK)
            if guest.actual > before:
                break
        times.append(guest.now - begin)
    assert times == sorted(times)
    assert times[0] >= COOLDOWN - 1
    assert times[-1] >= 4 * COOLDOWN


def test_where_it_may_not_shrink_it_only_grows_later() -> None:
    relief = Relief(RESERVE, shrinks=False)
    relief.lose(0.0, 500 * MIB)
    for now in (1.0, 2.0):
        relief.look(now, RESERVE // 2, 500 * MIB, 700 * MIB)
    assert (relief.cap, relief.count) == (500 * MIB, 0)
    assert relief.pause(2.0) == COOLDOWN


def test_what_the_balloon_must_have_it_keeps() -> None:
    relief = Relief(RESERVE)
    relief.look(0.0, RESERVE // 2, 500 * MIB, 700 * MIB, least=500 * MIB)
    assert (relief.cap, relief.count) == (None, 0)
    relief.look(0.0, RESERVE // 2, 510 * MIB, 700 * MIB, least=500 * MIB)
    assert (relief.cap, relief.count) == (500 * MIB, 1)


def test_need_that_is_far_apart_makes_it_wait_no_longer() -> None:
    guest = Guest()
    waits: list[float] = []
    for _ in range(5):
        guest.touch(400 * MIB)
        guest.used -= 400 * MIB
        begin = guest.now
        while guest.relief.active:
            guest.run(1.0)
        waits.append(guest.now - begin)
        guest.run(3 * COOLDOWN)
    assert max(waits) - min(waits) < COOLDOWN / 2
