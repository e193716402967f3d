"""The walk towards a size: what happens in which order, and what is true whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balloon_agent.errors import (
    DeviceTimeout,
    GaveWay,
    HolderLost,
    Shortage,
    StillHeld,
    Unfinished,
)
from balloon_agent.frames import FRAME, HUGE, Run
from balloon_agent.memory.ledger.ledger import Extent, Ledger, runs_of
from balloon_agent.memory.sources.source import MOST_RUNS
from balloon_agent.sizing.balloon import (
    MOST_ROUNDS,
    STEP,
    Balloon,
    HiddenMemory,
    Step,
)
from balloon_agent.sizing.posting import POST
from tests.device_model.guest import BLOCK, MIB, FakeGuest, sources


class FakeHost:
    """A host that discards what it is told of at once, and checks that it may."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.ledger: Ledger | None = None
        self.has: set[int] = set()
        self.actual: list[int] = []
        self.problem: Exception | None = None
        self.posts: list[int] = []
        self.deflates_on_oom = False
        self.bears_loss = False
        self.least = 1 << 30
        self.at_once = POST
        self.cuts: Sequence[int] = ()

    def inflate(self, runs: Sequence[Run]) -> None:
        if self.problem is not None:
            raise self.problem
        assert self.ledger is not None
        held = {frame for run in runs_of(self.ledger) for frame in range(run.first, run.end)}
        for run in runs:
            frames = range(run.first, run.end)
            assert held.issuperset(frames), "posted before it was in the ledger"
            assert not any(self.guest.free[run.first : run.end]), "the host discards a frame that the guest has"
            assert run.first // self.guest.boundary == (run.end - 1) // self.guest.boundary, "a run crosses a boundary"
            assert not any(run.first < cut < run.end for cut in self.cuts), "a run crosses a cut"
            self.has.update(frames)
        self.posts.append(sum(run.size for run in runs))

    def deflate(self, runs: Sequence[Run]) -> None:
        if self.problem is not None:
            raise self.problem
        for run in runs:
            self.has.difference_update(range(run.first, run.end))
        self.least = min(self.least, len(self.has) * FRAME)

    def set_actual(self, size: int) -> None:
        self.actual.append(size)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def announce(balloon: Balloon) -> None:
    for _ in balloon.announce():
        pass


class World:
    """Everything that a balloon needs, fake, with handles on it."""

    def __init__(
        self,
        enabled: Sequence[str] = ("blocks", "thp", "pages"),
        reserve: int = 0,
        cuts: Sequence[int] = (),
        guest: FakeGuest | None = None,
        hidden: HiddenMemory | None = None,
        caches: int = 0,
    ) -> None:
        self.guest = FakeGuest() if guest is None else guest
        self.sources = sources(self.guest)
        self.ledger = Ledger()
        self.host = FakeHost(self.guest)
        self.host.ledger = self.ledger
        self.host.cuts = cuts
        self.clock = Clock()
        self.balloon = Balloon(
            self.host,
            list(self.sources.values()),
            enabled,
            self.ledger,
            self.guest.spare,
            reserve,
            self.guest.boundary,
            self.clock,
            cuts=cuts,
            hidden=hidden,
            caches=lambda: caches,
        )

    def go_to(self, size: int, steps: int = 2000) -> Step:
        step = Step(moved=True)
        for _ in range(steps):
            step = self.balloon.step(size)
            if not step.moved:
                return step
        raise AssertionError(f"still moving after {steps} steps")

    def held_by_host_is_held_by_ledger(self) -> None:
        held = {frame for run in runs_of(self.ledger) for frame in range(run.first, run.end)}
        assert self.host.has <= held
        assert self.balloon.actual == len(held) * FRAME


@pytest.mark.parametrize("size", [0, FRAME, HUGE - FRAME, HUGE, 424 * MIB, 423 * MIB + FRAME, BLOCK, BLOCK - FRAME, 1000 * MIB])
def test_any_size_is_reached_exactly_up_and_down(size: int) -> None:
    world = World()
    for goal in (size, 1 << 29, size, 0):
        step = world.go_to(goal)
        assert step.shortfall is None
        assert world.balloon.actual == goal
        assert world.host.actual[-1:] in ([goal], [])
        world.held_by_host_is_held_by_ledger()
    assert world.guest.free.count(0) == 0


def test_the_coarsest_source_that_fits_comes_first_and_no_post_is_larger_than_a_step() -> None:
    world = World()
    world.go_to(424 * MIB + 3 * FRAME)
    assert world.ledger.by_source() == {"blocks": 3 * BLOCK, "thp": 40 * MIB, "pages": 3 * FRAME}
    assert max(world.host.posts) <= POST


def test_no_run_crosses_where_a_node_begins() -> None:
    nodes = [BLOCK // FRAME * 2 + 5, BLOCK // FRAME * 7 // 2]
    world = World(cuts=nodes)
    world.go_to(1000 * MIB)
    assert world.balloon.actual == 1000 * MIB
    assert len(world.host.has) * FRAME == 1000 * MIB
    world.go_to(0)
    assert not world.host.has


def test_a_source_that_has_nothing_is_passed_over_and_tried_again_later() -> None:
    world = World()
    world.sources["thp"].problem = Shortage("memory is fragmented")
    assert world.balloon.step(64 * MIB).moved
    assert world.ledger.by_source() == {"pages": 64 * MIB}
    assert world.balloon.notes == {"thp": "memory is fragmented"}
    world.sources["thp"].problem = None
    world.balloon.step(66 * MIB)
    assert "thp" not in world.ledger.by_source()
    world.clock.now += 10
    world.balloon.step(68 * MIB)
    assert world.ledger.by_source()["thp"] == 2 * MIB
    assert not world.balloon.notes


class FakeHidden:
    """Memory of a guest that hides, at its bottom: what is freed is free from then on."""

    note: str | None = None

    def __init__(self, guest: FakeGuest, size: int, at_once: int = 32 * MIB) -> None:
        self.guest = guest
        self.left = size // FRAME
        self.at_once = at_once // FRAME
        self.freed = {"split": 0}
        self.asked: list[int] = []
        guest.free[: self.left] = bytes(self.left)

    def free(self, wanted: int) -> bool:
        self.asked.append(wanted)
        some = min(self.left, self.at_once)
        self.guest.free[self.left - some : self.left] = b"\1" * some
        self.left -= some
        self.freed["split"] += some * FRAME
        return some > 0


def test_what_hides_is_freed_before_the_balloon_is_short() -> None:
    guest = FakeGuest()
    hidden = FakeHidden(guest, 400 * MIB)
    world = World(reserve=100 * MIB, guest=guest, hidden=hidden)
    # Hidden memory is left alone while there is enough without it.
    assert world.go_to(500 * MIB).shortfall is None
    assert (hidden.asked, world.balloon.hidden_freed) == ([], {"split": 0})
    assert world.go_to(900 * MIB).shortfall is None
    assert hidden.asked[0] == 376 * MIB, "400 MiB are wanted, and 24 MiB can be spared"
    assert world.balloon.actual == 900 * MIB
    step = world.go_to(1 << 30)
    assert step.shortfall is not None
    assert hidden.left == 0
    assert world.balloon.hidden_freed == {"split": 400 * MIB}
    world.held_by_host_is_held_by_ledger()


def test_what_hides_is_freed_before_a_cache_has_to_go() -> None:
    guest = FakeGuest()
    hidden = FakeHidden(guest, 400 * MIB)
    world = World(guest=guest, hidden=hidden, caches=300 * MIB)
    world.go_to(324 * MIB)
    assert hidden.asked == []
    world.go_to(424 * MIB)
    assert hidden.asked[0] == 100 * MIB, "100 MiB are wanted, and all that can be spared are caches"


def test_what_hides_is_freed_before_single_pages_are_taken() -> None:
    guest = FakeGuest()
    hidden = FakeHidden(guest, 64 * MIB)
    world = World(guest=guest, hidden=hidden)
    # No huge page is whole but those in what hides.
    for first in range(64 * MIB // FRAME, len(guest.free), HUGE // FRAME):
        guest.free[first] = 0
    world.go_to(64 * MIB)
    assert world.ledger.by_source() == {"thp": 64 * MIB}


def test_what_is_taken_beforehand_does_not_wait_for_what_hides() -> None:
    """Or the balloon would be smaller than the host allows meanwhile."""
    guest = FakeGuest()
    hidden = FakeHidden(guest, 200 * MIB)
    world = World(guest=guest, hidden=hidden)
    world.go_to(512 * MIB)
    assert world.ledger.by_source() == {"blocks": 512 * MIB}
    for first in range(200 * MIB // FRAME, 512 * MIB // FRAME, HUGE // FRAME):
        guest.free[first] = 0
    world.host.least = 1 << 30
    world.go_to(500 * MIB)
    assert world.host.least >= 500 * MIB
    world.held_by_host_is_held_by_ledger()


@pytest.mark.slow
def test_a_guest_that_can_spare_a_page_at_a_time_keeps_nobody_waiting() -> None:
    world = World()
    world.go_to(512 * MIB)
    world.guest.spare_frames = 1
    taken = []
    take = world.sources["pages"].take

    def record(size: int, of: int = 0) -> list[Extent]:
        taken.append(size)
        return take(size, of)

    world.sources["pages"].take = record  # type: ignore[method-assign]
    world.balloon.step(500 * MIB)
    assert taken == [FRAME] * MOST_ROUNDS
    world.held_by_host_is_held_by_ledger()


def test_why_memory_still_hides_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest()
    hidden = FakeHidden(guest, 0)
    world = World(reserve=MIB, guest=guest, hidden=hidden)
    hidden.note = "no debugfs"
    world.go_to(1 << 30)
    assert world.balloon.notes["hidden"] == "no debugfs"
    hidden.note = None
    world.go_to(1 << 30)
    assert "hidden" not in world.balloon.notes


def test_single_pages_are_exchanged_for_huge_ones_when_there_are_some() -> None:
    world = World()
    world.sources["thp"].problem = Shortage("memory is fragmented")
    size = 41 * MIB + 3 * FRAME
    world.go_to(size)
    assert world.ledger.by_source() == {"pages": size}
    assert not world.balloon.coarsen(), "there is nothing coarser"
    assert world.balloon.actual == size
    world.sources["thp"].problem = None
    world.clock.now += 10
    world.host.least = 1 << 30
    assert world.balloon.coarsen()
    assert world.host.least >= size, "the host has no less than it asked for"
    assert world.go_to(size).shortfall is None
    assert world.balloon.actual == size
    assert world.ledger.by_source() == {"thp": 40 * MIB, "pages": MIB + 3 * FRAME}
    assert world.balloon.scattered == 0
    world.held_by_host_is_held_by_ledger()


def test_an_exchange_that_falls_short_half_way_is_undone() -> None:
    world = World(enabled=("pages",))
    world.go_to(64 * MIB)
    world.balloon.enable(("thp", "pages"))
    # A single huge page is free; the pages are an extent of 64 MiB.
    for first in range(0, len(world.guest.free) - 2 * HUGE // FRAME - 64 * MIB // FRAME, HUGE // FRAME):
        world.guest.free[first] = 0
    world.host.least = 1 << 30
    assert not world.balloon.coarsen()
    assert world.host.least >= 64 * MIB
    assert world.ledger.by_source() == {"pages": 64 * MIB}
    world.held_by_host_is_held_by_ledger()


@pytest.mark.parametrize("below", [-3, 0, 1])
def test_nothing_is_exchanged_at_the_expense_of_the_reserve(below: int) -> None:
    """For a moment there are both, the old and the new."""
    guest = FakeGuest()
    world = World(enabled=("pages",), guest=guest)
    world.go_to(8 * MIB)
    world.balloon.enable(("blocks", "thp", "pages"))
    world.balloon.reserve = guest.spare() + below * MIB
    asked: list[int] = []
    for source in world.sources.values():
        take = source.take

        def record(size: int, of: int = 0, take: Callable[[int], Sequence[Extent]] = take) -> Sequence[Extent]:
            asked.append(size)
            return take(size)

        source.take = record  # type: ignore[method-assign, assignment]
    assert not world.balloon.coarsen()
    assert asked == []
    assert world.ledger.by_source() == {"pages": 8 * MIB}


@pytest.mark.parametrize("size", [HUGE, 7 * HUGE + FRAME, 40 * MIB - FRAME])
def test_exchanging_comes_to_an_end_whatever_the_size(size: int) -> None:
    world = World()
    world.balloon.enable(("pages",))
    for goal in range(FRAME * 5, size, 3 * MIB + FRAME):
        world.go_to(goal)
    world.go_to(size)
    world.balloon.enable(("blocks", "thp", "pages"))
    rounds = 0
    while world.balloon.scattered:
        assert world.balloon.coarsen()
        world.go_to(size)
        assert world.balloon.actual == size
        world.held_by_host_is_held_by_ledger()
        rounds += 1
        assert rounds < 300
    assert sum(held for source, held in world.ledger.by_source().items() if source != "pages") == size // HUGE * HUGE


def test_the_reserve_is_left_alone_and_the_shortfall_says_so() -> None:
    world = World(reserve=100 * MIB)
    step = world.go_to(1 << 30)
    assert step.shortfall == "the guest can spare 100 MiB, and 100 MiB of it are kept in reserve"
    assert world.balloon.actual == (1 << 30) - 100 * MIB


def test_a_host_that_fails_leaves_the_memory_held() -> None:
    world = World()
    world.go_to(10 * MIB)
    world.host.problem = DeviceTimeout("no answer")
    with pytest.raises(DeviceTimeout):
        world.balloon.step(20 * MIB)
    # What may or may not have arrived is in the ledger, still guarded, and not with the guest.
    assert world.balloon.actual == 20 * MIB
    assert len(world.sources["thp"].guarded) == 1
    assert world.guest.free.count(0) * FRAME == 20 * MIB
    with pytest.raises(DeviceTimeout):
        world.balloon.step(0)
    assert world.balloon.actual == 20 * MIB


def test_memory_that_moved_is_withdrawn_and_its_source_never_used_again() -> None:
    world = World(enabled=("thp", "pages"))
    world.sources["thp"].moved = True
    step = world.balloon.step(4 * MIB)
    assert step.shortfall is not None
    assert "moved after it was posted" in step.shortfall
    assert world.balloon.counters.moved_extents == 1
    assert world.balloon.actual == 0
    assert not world.host.has
    world.sources["thp"].moved = False
    world.clock.now += 1e9
    world.go_to(4 * MIB)
    assert world.ledger.by_source() == {"thp": 0, "pages": 4 * MIB} or world.ledger.by_source() == {"pages": 4 * MIB}


def test_what_the_guest_does_not_take_back_stays_in_the_balloon() -> None:
    world = World(enabled=("blocks",))
    world.go_to(2 * BLOCK)
    world.sources["blocks"].give_back_problem = StillHeld("memory7 does not come back")
    step = world.balloon.step(0)
    assert step.shortfall is not None
    assert "memory7" in step.shortfall
    assert world.balloon.actual == 2 * BLOCK
    assert world.host.actual[-1] == 2 * BLOCK
    assert len(world.host.has) * FRAME == 2 * BLOCK
    world.sources["blocks"].give_back_problem = None
    world.go_to(0)
    assert world.guest.free.count(0) == 0


def test_what_lies_scattered_goes_back_in_small_steps() -> None:
    """Somebody may be waiting for it, and has nothing of it before the host has heard of the last run."""
    world = World(enabled=("pages",))
    # Every second page is the guest's own.
    world.guest.free[::2] = bytes(len(world.guest.free) // 2)
    for _ in range(6):
        world.go_to(world.balloon.actual + MOST_RUNS // 2 * FRAME)
    before = world.balloon.actual
    world.balloon.step(0)
    assert before - world.balloon.actual == MOST_RUNS * FRAME
    world.go_to(0)


def test_what_is_quickest_goes_back_first_where_that_matters() -> None:
    for quickly, left in ((False, {"thp": 64 * MIB, "blocks": BLOCK}), (True, {"pages": 8 * MIB, "blocks": BLOCK})):
        world = World()
        world.go_to(BLOCK)
        world.balloon.enable(("thp",))
        world.go_to(BLOCK + 64 * MIB)
        world.balloon.enable(("pages",))
        world.go_to(BLOCK + 72 * MIB)
        while world.balloon.actual > sum(left.values()):
            world.balloon.step(sum(left.values()), quickly=quickly)
        assert world.ledger.by_source() == left


def test_a_holder_that_dies_takes_its_memory_out_of_the_balloon() -> None:
    world = World()
    world.go_to(BLOCK + 70 * MIB)
    lost = world.balloon.holder_lost("h")
    assert lost == 70 * MIB
    assert world.balloon.actual == BLOCK
    assert world.host.actual[-1] == BLOCK
    assert len(world.host.has) * FRAME == BLOCK


def test_a_holder_that_dies_before_it_verified_is_guarded_until_the_host_was_told() -> None:
    world = World(enabled=("thp",))
    world.sources["thp"].verify_problem = HolderLost("died")
    assert world.balloon.step(4 * MIB).moved
    assert world.sources["thp"].guarded == {"thp-1"}
    assert world.balloon.actual == 4 * MIB
    world.balloon.holder_lost("h")
    assert not world.sources["thp"].guarded
    assert not world.host.has


def test_what_is_held_already_is_announced_to_a_new_device() -> None:
    world = World()
    world.go_to(BLOCK + 200 * MIB)
    world.host.has.clear()
    world.host.posts.clear()
    announce(world.balloon)
    assert len(world.host.has) * FRAME == BLOCK + 200 * MIB
    assert world.host.actual[-1] == BLOCK + 200 * MIB
    assert max(world.host.posts) <= BLOCK + STEP


def test_a_dead_holders_frames_that_come_back_through_another_tell_of_its_death() -> None:
    world = World(enabled=("thp",))
    world.go_to(4 * MIB)
    source = world.sources["thp"]
    (extent,) = world.ledger
    source.dead.add(extent.name)
    world.guest.give_back(extent.runs)
    source.holder = "h2"
    # The guest lends the same frames again, at once, before we have heard of the death.
    assert world.balloon.step(8 * MIB) == Step(moved=True)
    assert extent.name not in world.ledger
    assert world.balloon.counters.holders_lost == 1
    world.held_by_host_is_held_by_ledger()
    assert world.balloon.holder_lost("h") == 0
    assert world.balloon.counters.holders_lost == 1
    world.go_to(8 * MIB)
    assert world.balloon.actual == 8 * MIB


def test_what_an_earlier_agent_left_is_struck_out_if_it_is_lost_or_not_in_place() -> None:
    world = World(enabled=("thp",))
    world.go_to(3 * STEP)
    first, *rest = world.ledger
    world.host.has.clear()
    world.sources["thp"].dead.add(first.name)
    world.guest.give_back(first.runs)
    announce(world.balloon)
    assert [extent.name for extent in world.ledger] == [extent.name for extent in rest]
    assert len(world.host.has) * FRAME == 2 * STEP
    assert not world.sources["thp"].guarded
    world.sources["thp"].moved = True
    world.host.has.clear()
    announce(world.balloon)
    assert len(world.ledger) == 0
    assert not world.host.has
    assert world.host.actual[-1] == 0


def test_a_source_that_has_more_to_try_is_asked_again_at_once() -> None:
    world = World()
    world.sources["blocks"].problem = Unfinished("memory7: busy")
    assert world.balloon.step(BLOCK) == Step(moved=True)
    assert world.balloon.actual == 0
    world.sources["blocks"].problem = None
    world.balloon.step(BLOCK)
    assert world.ledger.by_source() == {"blocks": BLOCK}


def test_a_source_that_gave_way_is_not_asked_again_at_once() -> None:
    """Nor is another one: somebody else needs the memory. But it is not left alone for a while, as one that has nothing is."""
    world = World()
    world.sources["blocks"].problem = GaveWay("somebody else needs the memory")
    assert world.balloon.step(BLOCK) == Step(False, "blocks: somebody else needs the memory")
    assert world.balloon.actual == 0
    world.sources["blocks"].problem = None
    world.balloon.step(BLOCK)
    assert world.ledger.by_source() == {"blocks": BLOCK}


def test_what_is_held_is_on_the_fuse_while_more_is_taken_if_the_host_bears_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(enabled=["thp"])
    source, fuse, at_takes = world.sources["thp"], [False], []
    take = source.take

    def note(size: int, of: int = 0) -> Sequence[Extent]:
        at_takes.append(fuse[-1])
        return take(size)

    monkeypatch.setattr(source, "rest", fuse.append)
    monkeypatch.setattr(source, "take", note)
    world.go_to(2 * STEP)
    world.host.bears_loss = True
    world.go_to(4 * STEP)
    assert at_takes == [False, False, True, True]
    # The next device may be another one, and knows of nothing that is held before it was told.
    world.host.bears_loss = False
    announcing = world.balloon.announce()
    next(announcing)
    assert fuse[-1] is False


def test_a_fuse_that_cannot_be_set_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(enabled=["thp"])

    def fails(_: bool) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(world.sources["thp"], "rest", fails)
    step = world.balloon.step(STEP)
    assert (step.moved, world.balloon.actual) == (False, 0)
    assert "Too many open files" in str(step.shortfall)


@pytest.mark.parametrize(("spare", "floor", "least"), [(True, None, 100), (False, None, 0), (True, 0, 0), (True, 40 * MIB, 40)])
def test_a_block_is_not_given_back_before_what_of_it_has_to_stay_was_made_up_for(
    spare: bool, floor: int | None, least: int
) -> None:
    """The balloon does not become smaller than it is to be, unless the guest has nothing to spare, or needs the memory."""
    world = World()
    world.go_to(BLOCK)
    if not spare:
        world.guest.spare_frames = 0
    world.balloon.step(100 * MIB, floor)
    assert world.host.least == least * MIB
    world.guest.spare_frames = 1 << 20
    world.go_to(100 * MIB)
    assert world.balloon.actual == world.host.actual[-1] == 100 * MIB
    assert world.ledger.by_source()["thp"] == 100 * MIB
    world.held_by_host_is_held_by_ledger()


class BalloonMachine(RuleBasedStateMachine):
    """Any mixture of goals and mishaps: no frame is lost, none is in two hands, and what the host has is held."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.unheard: list[str] = []

    @rule(goal=st.integers(0, 1 << 12).map(lambda pages: pages * 64 * FRAME), steps=st.integers(1, 6))
    def walk(self, goal: int, steps: int) -> None:
        for _ in range(steps):
            self.world.balloon.step(goal)
        self.world.clock.now += 1

    @rule(name=st.sampled_from(("blocks", "pages", "thp")), fails=st.booleans())
    def source_fails(self, name: str, fails: bool) -> None:
        self.world.sources[name].problem = Shortage("none") if fails else None

    @rule(name=st.sampled_from(("blocks", "pages", "thp")), fails=st.booleans())
    def give_back_fails(self, name: str, fails: bool) -> None:
        self.world.sources[name].give_back_problem = StillHeld("no") if fails else None

    @rule(frames=st.integers(0, 1 << 18))
    def guest_needs_memory(self, frames: int) -> None:
        self.world.guest.spare_frames = frames

    @rule()
    def the_holder_dies(self) -> None:
        """What it held is the guest's at once; that it died is heard of later."""
        holder = self.world.sources["thp"].holder
        for extent in self.world.ledger.of_holder(holder):
            self.world.sources[extent.source].dead.add(extent.name)
            self.world.guest.give_back(extent.runs)
        self.unheard.append(holder)
        for source in self.world.sources.values():
            source.holder = f"h{len(self.unheard)}-{holder}"

    @rule()
    def the_death_is_heard_of(self) -> None:
        while self.unheard:
            self.world.balloon.holder_lost(self.unheard.pop())

    @invariant()
    def every_frame_is_in_exactly_one_hand(self) -> None:
        world = self.world
        world.held_by_host_is_held_by_ledger()
        lost = {name for source in world.sources.values() for name in source.dead}
        gone = sum(extent.size for extent in world.ledger if extent.name in lost)
        assert world.guest.free.count(0) * FRAME == world.balloon.actual - gone
        assert not any(source.guarded for source in world.sources.values())


BalloonMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=15)
TestBalloon = BalloonMachine.TestCase
