"""When single pages are exchanged for huge ones."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from balloon_agent.frames import FRAME
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.coarsening import FIRST_PAUSE, LONGEST_PAUSE, Coarsening
from tests.device_model.agent import Agent
from tests.device_model.guest import MIB
from tests.device_model.world import World

HUGE = 2 << 20


class FakeBalloon:
    def __init__(self) -> None:
        self.scattered = 0
        self.available = 0
        self.tries: list[float] = []
        self.now = 50.0

    def coarsen(self) -> bool:
        self.tries.append(self.now)
        exchanged = min(self.available, self.scattered, 4 * HUGE)
        self.available -= exchanged
        self.scattered -= exchanged
        return exchanged > 0


def begin() -> tuple[FakeBalloon, Coarsening]:
    balloon = FakeBalloon()
    return balloon, Coarsening(cast("Balloon", balloon), lambda: balloon.now)


def run(balloon: FakeBalloon, coarsening: Coarsening, seconds: float) -> list[float]:
    """At rest for so long. When it tried, counted from now."""
    start, seen = balloon.now, len(balloon.tries)
    while (pause := coarsening.step()) is not None and balloon.now + pause <= start + seconds:
        balloon.now += pause
    balloon.now = start + seconds
    return [when - start for when in balloon.tries[seen:]]


def test_without_single_pages_nothing_ever_wakes_up() -> None:
    balloon, coarsening = begin()
    assert coarsening.step() is None
    assert run(balloon, coarsening, 1e6) == []


def test_in_vain_it_tries_ever_more_rarely() -> None:
    balloon, coarsening = begin()
    balloon.scattered = HUGE
    tries = run(balloon, coarsening, 100000)
    assert tries[:4] == [FIRST_PAUSE * each for each in (1, 3, 7, 15)]
    assert max(later - sooner for sooner, later in pairwise(tries)) == LONGEST_PAUSE
    # Something has changed.
    coarsening.begin_anew()
    assert run(balloon, coarsening, FIRST_PAUSE) == [FIRST_PAUSE]


def test_what_there_is_is_exchanged_step_by_step_and_then_it_sleeps() -> None:
    balloon, coarsening = begin()
    balloon.scattered, balloon.available = 10 * HUGE, 10 * HUGE
    assert run(balloon, coarsening, 3600) == [FIRST_PAUSE] * 3
    assert (balloon.scattered, coarsening.step()) == (0, None)


def in_single_pages(agent: Agent, size: int) -> None:
    """Have an agent at rest with ``size`` bytes, and from now on with huge pages to take if there are any."""
    agent.start()
    agent.world.balloon.enable(("pages",))
    agent.model.ask_for(size // FRAME)
    while agent.state.state != "resting":
        agent.turn()
    assert agent.state.held_bytes == {"pages": size}
    agent.world.balloon.enable(("thp", "pages"))


def test_an_agent_that_finds_too_little_tries_ever_more_rarely() -> None:
    """A single huge page is free, and the extent of single pages would need four."""
    agent = Agent(World())
    try:
        in_single_pages(agent, 8 * MIB)
        free = agent.world.guest.free
        whole = [first for first in range(0, len(free), HUGE // FRAME) if 0 not in free[first : first + HUGE // FRAME]]
        for first in whole[1:]:
            free[first] = 0
        began, pauses = agent.model.clock.now, []
        pause: float | None = 0.0
        while agent.model.clock.now < began + 250:
            pause = agent.turn(pause)
            assert pause is not None
            assert agent.state.actual_bytes == 8 * MIB
            pauses.append(pause)
        assert len(pauses) < 10, pauses
        assert max(pauses) >= 8 * FIRST_PAUSE
        # Stalls of that time are put down to the exchange.
        assert agent.daemon._need._moved_at > began + FIRST_PAUSE
        assert agent.state.held_bytes == {"pages": 8 * MIB}
    finally:
        agent.close()


def test_an_agent_at_rest_exchanges_them_and_the_host_never_has_less() -> None:
    agent = Agent(World())
    try:
        in_single_pages(agent, 5 * MIB)
        began, least = agent.model.clock.now, []
        pause: float | None = 0.0
        while pause is not None:
            pause = agent.turn(pause)
            least.append(len(agent.model.inflated) * FRAME)
        assert agent.model.clock.now - began >= FIRST_PAUSE
        assert agent.state.held_bytes == {"thp": 4 * MIB, "pages": MIB}
        assert (agent.state.state, agent.state.actual_bytes, agent.model.actual * FRAME) == ("resting", 5 * MIB, 5 * MIB)
        assert min(least) >= 5 * MIB
    finally:
        agent.close()
