"""A device that fails under the daemon: what is logged, counted, kept and brought back; and what the host may ask for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import pytest

from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import ConfigurationInvalid, DeviceTimeout
from balloon_agent.memory.frames import FRAME
from balloon_agent.memory.sources import Source
from balloon_agent.service.assembly import _release
from balloon_agent.service.daemon import STATISTICS_INTERVAL
from balloon_agent.service.recovery import LONGEST_PAUSE, MOST_SAID, SOUND_AFTER, Recovery, fault_kinds
from balloon_agent.sizing.balloon import Balloon
from tests.device_model.agent import Agent
from tests.device_model.guest import MIB
from tests.device_model.model import MODERN, BalloonModel, Clock
from tests.device_model.numbering import REPORTING, STATS, qemu
from tests.device_model.world import GUEST_SIZE, World

HELD = 21 * MIB + 3 * FRAME


@pytest.fixture
def agent() -> Iterator[Agent]:
    """At rest, with some of everything in the balloon."""
    agent = Agent(World())
    agent.start()
    agent.model.ask_for(HELD // FRAME)
    agent.rest()
    assert agent.state.actual_bytes == HELD
    yield agent
    agent.close()


def faults(agent: Agent) -> dict[str, int]:
    return {kind: count for kind, count in agent.state.device_faults_total.items() if count}


def break_down(agent: Agent) -> None:
    agent.model.break_down()
    agent.rest()


def test_a_fault_is_logged_once_counted_and_mended_at_once(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    begin = agent.model.clock.now
    break_down(agent)
    assert agent.state.state == "resting"
    assert agent.state.actual_bytes == HELD
    assert agent.model.actual * FRAME == HELD
    assert len(agent.model.inflated) * FRAME == HELD
    agent.model.at_rest(HELD // FRAME)
    assert faults(agent) == {"needs_reset": 1}
    assert agent.model.clock.now - begin < 1
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert logged == [
        "device fault: device_status is 0x4f, not 0xf: it needs a reset",
        f"the device works again, by its cont queues; {HELD / MIB:.10g} MiB announced anew",
    ]
    caplog.clear()
    for _ in range(5):
        break_down(agent)
    assert faults(agent) == {"needs_reset": 6}
    assert not caplog.records


def test_a_device_that_fails_all_the_time_is_tried_ever_more_rarely(agent: Agent) -> None:
    pauses = []
    for _ in range(10):
        agent.model.break_down()
        pauses.append(agent.turn())
        agent.rest()
    assert pauses[:5] == [0, *(pytest.approx(pause, abs=0.5) for pause in (1, 2, 4, 8))]
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE, abs=0.5)
    # Once it has been sound for long it is believed again.
    agent.model.clock.now += SOUND_AFTER + 1
    agent.model.break_down()
    assert agent.turn() == 0


def test_a_device_that_cannot_be_reset_is_left_alone_and_nothing_is_given_back(agent: Agent) -> None:
    model = agent.model
    model.quirks.stuck_reset = True
    model.break_down()
    for _ in range(5):
        agent.turn(1.0)
    assert agent.state.state == "failed"
    assert agent.state.at_rest
    assert agent.state.shortfall is not None
    assert "s after a reset, not 0" in agent.state.shortfall
    assert faults(agent)["timeout"] >= 2
    # Whoever commands is answered, and nothing moves.
    before, free = len(model.notifications), bytes(agent.world.guest.free)
    # By hand it may be smaller than the host wants.
    model.check_floor = False
    number = agent.daemon.command("manual", 0)
    for _ in range(20):
        agent.turn(30.0)
    assert agent.state.commands_done == number
    assert agent.state.actual_bytes == HELD
    assert (len(model.notifications), bytes(agent.world.guest.free)) == (before, free)
    # Neither is anything given back at the end.
    sources = cast("list[Source]", list(agent.world.sources.values()))
    _release(sources, agent.world.balloon, agent.world.device)
    assert bytes(agent.world.guest.free) == free
    model.quirks.stuck_reset = False
    agent.rest()
    assert agent.state.actual_bytes == 0
    assert 0 not in agent.world.guest.free


def test_what_is_left_in_the_balloon_goes_back_after_the_reset(agent: Agent) -> None:
    agent.world.device.stop()
    sources = cast("list[Source]", list(agent.world.sources.values()))
    _release(sources, agent.world.balloon, agent.world.device)
    assert 0 not in agent.world.guest.free


def test_a_device_that_does_not_answer_in_the_middle_loses_nothing(agent: Agent) -> None:
    agent.model.quirks.silent = True
    agent.model.ask_for(2 * HELD // FRAME)
    for _ in range(3):
        agent.turn(1.0)
    assert faults(agent) == {"timeout": 3}
    # Held, wherever it was on its way to.
    assert agent.world.guest.free.count(0) * FRAME == agent.world.balloon.actual > HELD
    agent.model.quirks.silent = False
    agent.rest()
    assert agent.state.actual_bytes == 2 * HELD // FRAME * FRAME
    agent.model.ask_for(0)
    agent.rest()
    assert 0 not in agent.world.guest.free


def test_a_device_that_comes_back_with_less_is_spoken_to_as_it_is(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    assert agent.state.channel == "cont"
    features = MODERN | REPORTING | STATS
    agent.model.be_reborn(features, qemu(features), 32)
    break_down(agent)
    assert agent.state.channel == "reporting"
    assert agent.model.reported_frames * FRAME == HELD
    assert agent.state.negotiated_features == features
    agent.model.be_reborn(0, [], 0)
    agent.model.break_down()
    for _ in range(3):
        agent.turn(1.0)
    assert agent.state.state == "failed"
    assert "the device does not come back: the device does not offer feature bits 32" in caplog.text


def test_a_target_beyond_the_machine_is_not_followed(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    notifications = len(agent.model.notifications)
    for _ in range(3):
        agent.model.ask_for(GUEST_SIZE // FRAME + 1)
        agent.rest()
    assert agent.state.actual_bytes == HELD
    assert len(agent.model.notifications) == notifications
    assert faults(agent) == {"target": 3}
    assert caplog.text.count("num_pages is 16385, more than the 16384 pages that the machine has") == 1
    assert "not the host's target" in agent.state.reason
    assert agent.state.host_target_bytes == GUEST_SIZE + FRAME
    # All of it is a size that can be asked for, though hardly reached.
    agent.model.ask_for(GUEST_SIZE // FRAME)
    agent.rest()
    assert agent.state.actual_bytes == GUEST_SIZE
    agent.model.ask_for(1)
    agent.rest()
    assert agent.state.actual_bytes == FRAME


def test_a_host_that_never_has_enough_statistics_is_given_some_now_and_then(agent: Agent) -> None:
    agent.statistics.asked = 0
    agent.model.clock.now += 1
    begin = agent.model.clock.now
    pause: float | None = 0.0
    for _ in range(100):
        agent.model.ask_for_stats()
        pause = agent.turn(pause)
    passed = agent.model.clock.now - begin
    assert 1 < agent.statistics.asked <= passed / STATISTICS_INTERVAL + 2


def test_news_that_come_while_the_last_buffer_is_waited_for_are_not_slept_over() -> None:
    agent = Agent(World())
    agent.model.quirks.late = True
    agent.start()
    agent.rest()
    agent.model.ask_for(1)

    def change_once(model: BalloonModel) -> None:
        model.on_notification = lambda model: None
        model.ask_for(2)

    agent.model.on_notification = change_once
    agent.rest()
    assert agent.state.actual_bytes == 2 * FRAME
    agent.close()


def test_a_holder_that_dies_while_the_device_is_down_leaves_the_ledger_with_the_reset(agent: Agent) -> None:
    agent.model.quirks.stuck_reset = True
    agent.model.break_down()
    agent.turn()
    agent.turn()
    agent.kill_holder(heard=True)
    agent.turn(1.0)
    # The device may still do to these frames what it likes, and the ledger says so.
    assert agent.world.balloon.actual == HELD
    agent.model.quirks.stuck_reset = False
    agent.model.ask_for(0)
    agent.rest()
    assert 0 not in agent.world.guest.free


def test_no_more_than_so_many_different_faults_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    recovery = Recovery(cast("BalloonDevice", None), cast("Balloon", None), Clock())
    for number in range(100):
        recovery.count("used_ring", f"id {number}")
    assert len(caplog.records) == MOST_SAID
    assert recovery.faults["used_ring"] == 100


def test_every_kind_of_fault_is_counted_from_the_start() -> None:
    assert {ConfigurationInvalid.kind, DeviceTimeout.kind, "used_ring", "needs_reset", "was_reset", "target"} <= set(
        fault_kinds()
    )
    recovery = Recovery(cast("BalloonDevice", None), cast("Balloon", None))
    assert recovery.faults == dict.fromkeys(fault_kinds(), 0)
