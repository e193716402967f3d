"""Memory blocks that others bring online: before the host is told of them, meanwhile, and while they are in the balloon."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from balloon_agent.errors import StillHeld
from balloon_agent.frames import FRAME, HUGE, Run
from balloon_agent.memory.ledger.ledger import Extent
from balloon_agent.sizing.posting import POST
from tests.device_model.agent import Agent
from tests.device_model.guest import BLOCK, MIB, FakeGuest, FakeSource
from tests.device_model.world import BLOCK_SIZE
from tests.device_model.world import World as ModelWorld
from tests.unit.test_balloon import World, announce

HELD = 21 * MIB + 3 * FRAME


def one_block(world: World) -> Extent:
    return next(extent for extent in world.ledger if extent.source == "blocks")


def lose_when(source: FakeSource, happens: Callable[[Extent], bool]) -> None:
    """The guest gets a block back as soon as the state of it is asked for and ``happens`` says so, once."""
    original = source.is_ours
    done: list[Extent] = []

    def is_ours(extent: Extent) -> bool:
        if not done and happens(extent):
            done.append(extent)
            source.lose(extent)
        return original(extent)

    source.is_ours = is_ours  # type: ignore[method-assign]


def test_a_block_that_is_online_when_the_host_is_to_be_told_is_not_posted() -> None:
    """The fake host fails the test if it is told of a frame that the guest has."""
    world = World(enabled=("blocks",))
    lose_when(world.sources["blocks"], lambda extent: extent.name == "blocks-2")
    assert world.balloon.step(3 * BLOCK).moved
    assert [extent.name for extent in world.ledger] == ["blocks-1", "blocks-3"]
    assert world.host.actual[-1] == world.balloon.actual == 2 * BLOCK
    assert world.balloon.counters.blocks_lost == 1
    assert world.balloon.counters.moved_extents == 0
    world.go_to(3 * BLOCK)
    world.held_by_host_is_held_by_ledger()
    world.go_to(0)
    assert world.guest.free.count(0) == 0


@pytest.mark.parametrize("at_once", [16 * MIB, BLOCK, POST])
def test_the_state_is_read_before_and_after_each_notification(at_once: int) -> None:
    """A slow host hears of a block in several notifications, and of several blocks one after the other."""
    world = World(enabled=("blocks",))
    world.host.at_once = at_once
    said: list[str] = []
    inflate, is_ours = world.host.inflate, world.sources["blocks"].is_ours

    def told(runs: Sequence[Run]) -> None:
        assert sum(run.size for run in runs) <= at_once
        said.append("told")
        inflate(runs)

    def asked(extent: Extent) -> bool:
        said.append(extent.name)
        return is_ours(extent)

    world.host.inflate = told  # type: ignore[method-assign]
    world.sources["blocks"].is_ours = asked  # type: ignore[method-assign]
    world.balloon.step(2 * BLOCK)
    names = ["blocks-1", "blocks-2"]
    together = [[*names]] if at_once == POST else [[name] for name in names]
    notifications = max(1, BLOCK // at_once)
    assert said == [word for group in together for word in [*group, *["told", *group] * notifications]]


def test_a_block_that_is_online_when_the_host_has_answered_ends_the_taking_of_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """The host may have discarded what the guest has by then: that is as bad as memory that moved."""
    world = World(enabled=("blocks", "thp"))
    world.host.at_once = BLOCK // 2
    asked: list[str] = []

    def after_the_first_notification(extent: Extent) -> bool:
        asked.append(extent.name)
        return len(asked) == 2

    lose_when(world.sources["blocks"], after_the_first_notification)
    step = world.balloon.step(2 * BLOCK)
    assert step.shortfall is not None
    assert "moved after it was posted" in step.shortfall
    assert world.balloon.counters.moved_extents == 1
    assert world.host.posts == [BLOCK // 2, BLOCK // 2, BLOCK // 2], "the rest of a block that is lost is not posted"
    world.held_by_host_is_held_by_ledger()
    world.clock.now += 1e9
    world.go_to(2 * BLOCK)
    assert world.ledger.by_source() == {"blocks": BLOCK, "thp": BLOCK}


def test_a_block_that_comes_online_after_the_answer_is_struck_out_and_others_are_taken() -> None:
    world = World(enabled=("blocks",))
    source = world.sources["blocks"]
    in_place = source.in_place

    def late(extent: Extent) -> bool:
        if extent.name == "blocks-1":
            source.lose(extent)
        return in_place(extent) if extent.name not in source.dead else False

    source.in_place = late  # type: ignore[method-assign]
    assert world.balloon.step(BLOCK).moved
    assert world.balloon.actual == 0
    assert world.host.actual[-1] == 0
    assert world.balloon.counters.blocks_lost == 1
    assert world.balloon.counters.moved_extents == 0
    world.go_to(2 * BLOCK)
    world.held_by_host_is_held_by_ledger()


def test_a_block_that_came_online_is_not_announced_and_one_that_does_meanwhile_is_taken_back() -> None:
    world = World(enabled=("blocks",))
    world.go_to(6 * BLOCK)
    world.host.has.clear()
    source = world.sources["blocks"]
    source.lose(one_block(world))
    asked: list[str] = []

    def after_the_first_notification(extent: Extent) -> bool:
        asked.append(extent.name)
        return len(asked) == 2

    lose_when(source, after_the_first_notification)
    announce(world.balloon)
    assert world.balloon.counters.blocks_lost == 1
    assert world.balloon.counters.moved_extents == 1
    assert world.host.actual[-1] == world.balloon.actual == 4 * BLOCK
    world.held_by_host_is_held_by_ledger()


def test_what_is_lost_between_two_steps_of_an_announcement_is_left_out_of_it() -> None:
    world = World(enabled=("blocks",))
    world.go_to(3 * BLOCK)
    world.host.has.clear()
    steps = world.balloon.announce()
    next(steps)
    lost = list(world.ledger)[-1]
    world.sources["blocks"].lose(lost)
    assert world.balloon.blocks_lost([lost.name]) == BLOCK
    for _ in steps:
        pass
    assert len(world.host.has) * FRAME == world.balloon.actual == 2 * BLOCK


def test_a_block_that_was_not_given_back_and_comes_online_is_not_kept() -> None:
    """The fake host fails the test if it is told again of what the guest has."""
    world = World(enabled=("blocks",))
    world.go_to(BLOCK)
    source, block = world.sources["blocks"], one_block(world)
    source.give_back_problem = StillHeld("it does not come back")
    lose_when(source, lambda extent: True)
    world.balloon.step(0)
    assert block.name not in world.ledger
    assert not world.host.has
    assert world.host.actual[-1] == 0


def test_blocks_that_are_lost_leave_the_balloon_and_the_host_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    world = World(enabled=("blocks",))
    world.go_to(3 * BLOCK)
    block = one_block(world)
    world.sources["blocks"].lose(block)
    assert world.balloon.blocks_lost([block.name, "blocks-99"]) == BLOCK
    assert world.balloon.blocks_lost([block.name]) == 0, "once is enough"
    assert world.host.actual[-1] == world.balloon.actual == 2 * BLOCK
    world.held_by_host_is_held_by_ledger()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert block.name in warned[0]


class FakeWatch:
    """Tells of blocks that were lost."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.names: list[str] = []

    def tell(self, *names: str) -> None:
        self.names += names
        os.eventfd_write(self.fd, 1)

    def fileno(self) -> int:
        return self.fd

    def lost(self) -> list[str]:
        os.eventfd_read(self.fd)
        names, self.names = self.names, []
        return names


@pytest.fixture
def watch() -> Iterator[FakeWatch]:
    watch = FakeWatch()
    yield watch
    os.close(watch.fd)


@pytest.fixture
def agent(watch: FakeWatch) -> Iterator[Agent]:
    """At rest, with some of everything in the balloon."""
    # The guest has what was lost before the host could be told: the balloon is too small for a moment.
    agent = Agent(ModelWorld(check_floor=False), blocks=watch)
    agent.start()
    agent.model.ask_for(HELD // FRAME)
    agent.rest()
    assert agent.state.held_bytes["blocks"] == 2 * BLOCK_SIZE
    yield agent
    agent.close()


def lose_block(agent: Agent, watch: FakeWatch) -> Extent:
    block = next(extent for extent in agent.world.ledger if extent.source == "blocks")
    agent.world.sources["blocks"].lose(block)
    watch.tell(block.name)
    return block


def test_the_daemon_strikes_out_a_block_as_it_hears_of_it_and_goes_on_to_its_target(agent: Agent, watch: FakeWatch) -> None:
    block = lose_block(agent, watch)
    agent.turn()
    assert block.name not in agent.world.ledger
    agent.rest()
    assert agent.state.actual_bytes == agent.model.actual * FRAME == HELD
    assert agent.state.blocks_lost_total == 1
    assert agent.state.state == "resting"


def test_a_block_that_is_lost_after_it_was_told_anew_is_struck_out_when_the_device_is_back(
    agent: Agent, watch: FakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balloon_agent.sizing.balloon.STEP", MIB)
    agent.model.break_down()
    agent.turn()
    block = next(extent for extent in agent.world.ledger if extent.source == "blocks")
    agent.turn()
    # It has been reset, and told of this one.
    assert agent.model.inflated == set(range(block.runs[0].first, block.runs[0].end))
    assert agent.state.state == "recovering"
    agent.world.sources["blocks"].lose(block)
    watch.tell(block.name)
    agent.turn()
    agent.rest()
    assert block.name not in agent.world.ledger
    assert agent.state.actual_bytes == agent.model.actual * FRAME == HELD
    assert agent.state.blocks_lost_total == 1


def test_a_block_that_is_lost_before_it_is_told_anew_is_left_out(agent: Agent, watch: FakeWatch) -> None:
    agent.model.break_down()
    agent.turn()
    block = lose_block(agent, watch)
    agent.rest()
    assert block.name not in agent.world.ledger
    assert agent.state.actual_bytes == agent.model.actual * FRAME == HELD
    assert agent.state.blocks_lost_total == 1


def test_a_source_of_huge_pages_is_not_asked_for_more_than_it_was() -> None:
    """What is guarded cannot be lost between translation and answer."""
    source = FakeSource("thp", HUGE, FakeGuest())
    (extent,) = source.take(HUGE)
    source.lose(extent)
    assert source.is_ours(extent)
