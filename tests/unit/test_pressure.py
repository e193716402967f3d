"""What the daemon makes of the guest's need of memory: how far the balloon shrinks, what the host allows, how it returns."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from balloon_agent.agent.policy import Policy
from balloon_agent.agent.systemd import Notifier
from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME
from balloon_agent.sizing.balloon import Step
from balloon_agent.sizing.governor import Mode
from balloon_agent.sizing.pressure import LONGEST_SAMPLE, STALLS_AFTER
from balloon_agent.sizing.relief import CLOSE_LOOK, CLOSE_LOOKS_FOR, COOLDOWN
from tests.device_model.agent import Agent, FakeDemand
from tests.device_model.guest import MIB
from tests.device_model.model import MODERN
from tests.device_model.numbering import CONT, DEFLATE_ON_OOM, STATS
from tests.device_model.world import World

FEATURES = MODERN | CONT | STATS
RESERVE = 4 * MIB
HELD = 40 * MIB


@pytest.fixture
def demand() -> Iterator[FakeDemand]:
    demand = FakeDemand()
    yield demand
    demand.close()


def at_rest(demand: FakeDemand | None, features: int = FEATURES | DEFLATE_ON_OOM, **options: Any) -> Agent:
    agent = Agent(World(features), RESERVE, demand=demand, **options)
    agent.start()
    agent.model.ask_for(HELD // FRAME)
    return agent


def spares(agent: Agent, size: int) -> None:
    agent.world.guest.spare_frames = size // FRAME


PLENTY = 1 << 40


def test_the_balloon_shrinks_for_who_needs_memory_and_returns(demand: FakeDemand) -> None:
    agent = at_rest(demand)
    agent.rest()
    spares(agent, 1 * MIB)
    demand.tell()
    while agent.state.actual_bytes:
        agent.turn()
    assert demand.consumed == 1
    assert agent.state.reliefs_total == 1
    assert agent.state.relief_active
    assert (agent.state.target_bytes, agent.state.wanted_bytes) == (0, HELD)
    assert "the guest needs memory; the host's target is 40 MiB" in agent.state.reason
    begin = agent.model.clock.now
    spares(agent, PLENTY)
    agent.rest()
    assert agent.state.actual_bytes == HELD
    assert not agent.state.relief_active
    assert agent.model.clock.now - begin >= COOLDOWN
    agent.close()


def test_who_needs_memory_gets_what_is_quickest(demand: FakeDemand, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = at_rest(demand)
    balloon, step = agent.world.balloon, agent.world.balloon.step
    quick: list[bool] = []

    def note(goal: int, floor: int | None = None, *, quickly: bool = False) -> Step:
        if goal < balloon.actual:
            quick.append(quickly)
        return step(goal, floor, quickly=quickly)

    monkeypatch.setattr(balloon, "step", note)
    agent.rest()
    spares(agent, 1 * MIB)
    demand.tell()
    while agent.state.actual_bytes:
        agent.turn()
    assert quick
    assert all(quick)
    quick.clear()
    spares(agent, PLENTY)
    agent.rest()
    agent.model.ask_for(0)
    agent.rest()
    assert quick
    assert not any(quick)
    agent.close()


def test_a_sign_of_need_is_none_where_there_is_enough(demand: FakeDemand) -> None:
    agent = at_rest(demand)
    agent.rest()
    demand.tell()
    agent.rest()
    assert demand.consumed == 1
    assert agent.state.actual_bytes == HELD
    assert agent.state.reliefs_total == 0
    agent.close()


def test_where_little_is_left_it_looks_closely_for_a_while(demand: FakeDemand) -> None:
    """The kernel tells of the first need only: with a part of the reserve gone the rest may follow before it tells again."""
    agent = at_rest(demand)
    agent.rest()
    spares(agent, RESERVE - FRAME)
    demand.tell()
    # Not in need yet.
    assert agent.turn() == CLOSE_LOOK
    assert agent.state.actual_bytes == HELD
    begin, pause = agent.model.clock.now, CLOSE_LOOK
    while pause == CLOSE_LOOK:
        pause = agent.turn(pause) or 0.0
    assert CLOSE_LOOKS_FOR - CLOSE_LOOK <= agent.model.clock.now - begin <= CLOSE_LOOKS_FOR + 4 * CLOSE_LOOK
    assert agent.state.reliefs_total == 0
    demand.tell()
    agent.turn()
    # Now it follows, and nothing more is told of it.
    spares(agent, RESERVE // 2)
    begin, pause = agent.model.clock.now, CLOSE_LOOK
    while not agent.state.reliefs_total and agent.model.clock.now < begin + 3 * CLOSE_LOOK:
        pause = agent.turn(pause) or 0.0
    assert agent.state.reliefs_total == 1
    agent.close()


@pytest.mark.parametrize("allowed", [None, True])
def test_the_host_may_forbid_less_than_its_target(demand: FakeDemand, allowed: bool | None) -> None:
    agent = at_rest(demand, FEATURES, policy=Policy(below_target=allowed))
    agent.model.check_floor = allowed is None
    agent.rest()
    # What is beyond the host's target, set by hand, is not the host's business.
    agent.daemon.inbox.command(Mode.MANUAL, HELD + 8 * MIB)
    agent.turn()
    agent.rest()
    assert agent.state.actual_bytes == HELD + 8 * MIB
    spares(agent, 1 * MIB)
    demand.tell()
    for _ in range(10):
        agent.turn()
    assert agent.state.actual_bytes == (HELD if allowed is None else 0)
    assert ("forbids less than its target" in agent.state.reason) == (allowed is None)
    agent.close()


def test_limits_are_kept(demand: FakeDemand) -> None:
    agent = at_rest(demand, policy=Policy(lower=8 * MIB, upper=16 * MIB))
    agent.rest()
    assert agent.state.actual_bytes == 16 * MIB
    assert agent.state.reason == "the upper limit; the host's target is 40 MiB"
    agent.model.ask_for(0)
    agent.rest()
    assert agent.state.actual_bytes == 8 * MIB
    agent.close()


def test_what_thrashes_needs_memory_whatever_could_be_had(demand: FakeDemand) -> None:
    stalls = os.eventfd(0, os.EFD_CLOEXEC)
    agent = at_rest(demand, stalls_fd=stalls)
    while agent.state.actual_bytes < HELD:
        agent.turn()
    # The balloon has just moved: that is the reason.
    agent.daemon._need._is_thrashing = agent.daemon._need._is_wanted = False
    assert agent.model.clock.now < agent.daemon._need._moved_at + STALLS_AFTER
    agent.model.clock.now += STALLS_AFTER
    # Not one of a cgroup with a limit of its own, in a guest that has plenty.
    spare, agent.daemon._need._spare = agent.daemon._need._spare, lambda: PLENTY
    agent.daemon._need._is_wanted = agent.daemon._need._is_thrashing = True
    agent.turn()
    assert agent.state.reliefs_total == 0
    agent.daemon._need._spare = spare
    spares(agent, RESERVE + 1 * MIB)
    agent.daemon._need._is_wanted = agent.daemon._need._is_thrashing = True
    agent.turn()
    assert agent.state.reliefs_total == 1
    assert agent.state.actual_bytes < HELD
    os.close(stalls)
    agent.close()


def test_a_trigger_that_has_failed_is_not_polled_any_more(demand: FakeDemand, caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    agent = at_rest(demand, stalls_fd=reading)
    agent.rest()
    agent.turn()
    assert reading not in agent.daemon._need.signs(agent.model.clock.now, HELD)
    assert len([line for line in caplog.messages if "thrashing is not noticed any more" in line]) == 1
    assert agent.state.reliefs_total == 0
    os.close(reading)
    agent.close()


def test_need_that_cannot_be_heard_of_is_looked_for() -> None:
    agent = at_rest(None, samples=True)
    pause: float | None = 0.0
    while agent.state.actual_bytes < HELD:
        pause = agent.turn(pause)
    assert pause is not None
    assert pause <= LONGEST_SAMPLE
    spares(agent, 1 * MIB)
    while agent.state.actual_bytes:
        pause = agent.turn(pause)
    assert agent.state.reliefs_total == 1
    agent.close()


def test_need_is_looked_for_while_the_kernel_has_given_up(demand: FakeDemand) -> None:
    """It wakes kswapd up no more then, and tells of need when nothing is left."""
    agent = at_rest(demand)
    agent.rest()
    demand.tell()
    # It has something to try yet.
    pause = agent.turn()
    agent.world.guest.has_given_up = True
    for _ in range(3):
        pause = agent.turn(pause)
        assert pause is not None
        assert pause <= LONGEST_SAMPLE
    assert agent.state.actual_bytes == HELD
    spares(agent, 1 * MIB)
    while agent.state.actual_bytes:
        pause = agent.turn(pause)
    assert agent.state.reliefs_total == 1
    # Somebody else has reclaimed something.
    agent.world.guest.has_given_up = False
    spares(agent, PLENTY)
    agent.rest()
    assert agent.state.actual_bytes == HELD
    agent.close()


def test_a_balloon_that_is_held_stays_where_it_is(demand: FakeDemand) -> None:
    agent = at_rest(demand)
    agent.rest()
    agent.daemon.inbox.command(Mode.HOLD, None)
    agent.turn()
    agent.model.ask_for(0)
    agent.rest()
    assert (agent.state.mode, agent.state.actual_bytes) == ("hold", HELD)
    agent.daemon.inbox.command(Mode.FOLLOW, None)
    agent.rest()
    assert agent.state.actual_bytes == 0
    agent.close()


def test_a_block_that_is_too_much_is_made_up_for_before_it_goes(demand: FakeDemand) -> None:
    agent = at_rest(demand)
    agent.daemon.inbox.command(Mode.MANUAL, 24 * MIB)
    agent.turn()
    agent.rest()
    agent.daemon.inbox.command(Mode.MANUAL, 19 * MIB)
    seen = [agent.state.actual_bytes]
    while agent.turn() is not None:
        seen.append(agent.state.actual_bytes)
    assert (min(seen) >= 19 * MIB, agent.state.actual_bytes) == (True, 19 * MIB), seen
    agent.close()


class FakeSystemd(Notifier):
    """Takes down what systemd is told."""

    def __init__(self, watchdog: float | None) -> None:
        super().__init__({})
        self.watchdog = watchdog
        self.told: list[str] = []

    def _send(self, text: str) -> None:
        self.told.append(text.partition("\n")[0])


def test_who_watches_hears_of_the_owner_thread_while_nothing_happens(demand: FakeDemand) -> None:
    systemd = FakeSystemd(watchdog=3.0)
    agent = at_rest(demand, notifier=systemd)
    agent.rest()
    assert "STATUS=the balloon has 40 MiB" in systemd.told
    clock = agent.model.clock
    begin, pause = clock.now, systemd.stay_alive(clock.now, None)
    while clock.now < begin + 30:
        assert pause is not None
        clock.now += pause
        pause = systemd.stay_alive(clock.now, agent.turn())
    assert 10 <= systemd.told.count("WATCHDOG=1") <= 12
    systemd.watchdog = None
    assert systemd.stay_alive(clock.now, None) is None
    assert systemd.stay_alive(clock.now, 7.0) == 7.0
    agent.close()


def test_options_are_read_anew_whole_or_not_at_all(demand: FakeDemand) -> None:
    systemd = FakeSystemd(watchdog=None)
    policies: list[Policy | Exception] = [Policy(upper=16 * MIB), BadInput("line 3 makes no sense"), ValueError("what?")]

    def reload() -> Policy:
        policy = policies.pop(0)
        if isinstance(policy, Exception):
            raise policy
        return policy

    agent = at_rest(demand, reload=reload, notifier=systemd)
    agent.rest()
    for _ in range(3):
        agent.daemon._read_again(1, None)
        agent.turn()
        agent.rest()
        assert agent.state.actual_bytes == 16 * MIB
    assert policies == []
    assert systemd.told.count("RELOADING=1") == systemd.told.count("READY=1") == 3
    agent.close()


def test_what_was_asked_for_is_gone_on_with(demand: FakeDemand) -> None:
    wishes: list[tuple[str, int]] = []
    agent = at_rest(demand, wish=("manual", 8 * MIB), remember=lambda *wish: wishes.append(wish))
    agent.rest()
    assert (agent.state.mode, agent.state.actual_bytes) == ("manual", 8 * MIB)
    agent.daemon.inbox.command(Mode.HOLD, None)
    agent.turn()
    agent.daemon.inbox.command(Mode.FOLLOW, None)
    agent.turn()
    assert wishes == [("hold", 8 * MIB), ("follow", 0)]
    agent.close()


@pytest.mark.parametrize("keeps", [False, True])
def test_the_balloon_ends_with_the_agent_or_outlives_it(demand: FakeDemand, keeps: bool) -> None:
    agent = at_rest(demand, policy=Policy(keeps=keeps))
    agent.rest()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    agent.daemon._stopping = True
    try:
        assert agent.daemon.run() == keeps
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert agent.state.actual_bytes == (HELD if keeps else 0)
    agent.close()


def test_where_memory_is_can_be_asked_from_another_thread(demand: FakeDemand) -> None:
    agent = at_rest(demand)
    agent.rest()
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(agent.daemon.inbox.locate(2 * MIB)))
    asking.start()
    while asking.is_alive():
        agent.turn()
        asking.join(0.01)
    assert sum(size for pieces in json.loads(answers[0])["map"].values() for _, size in pieces) == HELD


class BrokenUevents:
    """A socket of the kernel's uevents that fails whenever it is read, and is always ready."""

    def __init__(self) -> None:
        self.fd = os.eventfd(1, os.EFD_CLOEXEC)
        self.read = 0

    def fileno(self) -> int:
        return self.fd

    def lost(self) -> list[str]:
        self.read += 1
        raise OSError(errno.EIO, "it is broken")


def test_uevents_that_fail_are_not_polled_any_more(demand: FakeDemand, caplog: pytest.LogCaptureFixture) -> None:
    uevents = BrokenUevents()
    agent = at_rest(demand, blocks=uevents)
    agent.rest()
    assert agent.state.actual_bytes == HELD
    assert len([line for line in caplog.messages if "are not noticed before the next start" in line]) == 1
    assert uevents.read == 1
    os.close(uevents.fd)
    agent.close()
