"""A device that fails under the daemon: what is logged, counted, kept and brought back; and what the host may ask for."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from balloon_agent.agent.daemon import LONGEST_RETRY, STATISTICS_INTERVAL
from balloon_agent.agent.policy import Policy
from balloon_agent.agent.recovery import (
    LONGEST_PAUSE,
    MOST_SAID,
    SOUND_AFTER,
    Recovery,
    fault_kinds,
)
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import (
    ConfigurationInvalid,
    DeviceGone,
    DeviceTimeout,
    DeviceWanted,
    StillHeld,
)
from balloon_agent.frames import FRAME
from balloon_agent.memory.sources.source import Source
from balloon_agent.sizing import balloon as balloon_module
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.governor import Mode
from balloon_agent.takeover.release import release, silence
from balloon_agent.virtio.device import RESET_DEADLINE
from tests.device_model.agent import MOST_TURNS, Agent, FakeDemand, Slot
from tests.device_model.guest import MIB
from tests.device_model.model import MODERN, BalloonModel
from tests.device_model.numbering import CONT, DEFLATE_ON_OOM, REPORTING, STATS, qemu
from tests.device_model.parts import Clock, Quirks
from tests.device_model.world import BLOCK_SIZE, GUEST_SIZE, World

HELD = 21 * MIB + 3 * FRAME
# What an earlier agent has left: two blocks, more huge pages than one step has, single pages.
LEFT = 2 * BLOCK_SIZE + 6 * MIB + 5 * FRAME
RESERVE = 8 * MIB


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
        if pauses[-1]:
            # Until it is tried again it is kept away from memory, and everybody can see that it is.
            assert agent.model.status == 0
            assert agent.world.device.quiet
            assert agent.state.state == "failed"
            assert not agent.state.state.device_up
        assert faults(agent) == {"needs_reset": len(pauses)}
        agent.rest()
        assert agent.state.state.device_up
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
    assert agent.state.state.at_rest
    assert agent.state.shortfall is not None
    assert "s after a reset, not 0" in agent.state.shortfall
    assert faults(agent)["timeout"] >= 2
    assert not model.bus_master
    # Reset once in each try, not twice.
    before = agent.model.clock.now
    agent.turn(agent.recovery.wait)
    assert agent.model.clock.now - before < (agent.recovery.wait or 0.0) + 2 * RESET_DEADLINE
    # Whoever commands is answered, and nothing moves.
    before, free = len(model.notifications), bytes(agent.world.guest.free)
    # By hand it may be smaller than the host wants.
    model.check_floor = False
    number = agent.daemon.inbox.command(Mode.MANUAL, 0)
    for _ in range(20):
        agent.turn(30.0)
    assert agent.state.commands_done == number
    assert agent.state.actual_bytes == HELD
    assert (len(model.notifications), bytes(agent.world.guest.free)) == (before, free)
    # Neither is anything given back at the end.
    release(sources(agent), agent.world.balloon, agent.world.device)
    assert bytes(agent.world.guest.free) == free
    model.quirks.stuck_reset = False
    agent.rest()
    assert agent.state.actual_bytes == 0
    assert 0 not in agent.world.guest.free


def test_what_is_left_in_the_balloon_goes_back_after_the_reset(agent: Agent) -> None:
    agent.world.device.stop()
    release(sources(agent), agent.world.balloon, agent.world.device)
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
    # Nothing was posted on it yet: its counters are there all the same, so that their first rise is seen.
    assert agent.state.queues["deflate_cont"] == dict.fromkeys(agent.state.queues["inflate_cont"], 0)
    features = MODERN | REPORTING | STATS
    agent.model.be_reborn(features, qemu(features), 32)
    break_down(agent)
    assert agent.state.channel == "reporting"
    assert agent.state.queues.keys() == agent.state.queue_seconds.keys() == {"inflate_cont", "deflate_cont", "reporting"}
    assert agent.model.reported_frames * FRAME == HELD
    assert agent.state.negotiated_features == features
    agent.model.be_reborn(0, [], 0)
    agent.model.break_down()
    for _ in range(3):
        agent.turn(1.0)
    assert agent.state.state == "failed"
    assert "the device does not come back: the device does not offer feature bits 32" in caplog.text


def test_a_target_beyond_the_machine_is_not_followed(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    for beyond in (1, 1, 2, 3):
        agent.model.ask_for(GUEST_SIZE // FRAME + beyond)
        for _ in range(3):
            # Nothing happens, but for a look from time to time at how much memory there is.
            assert agent.turn() == LONGEST_RETRY
    agent.model.break_down()
    for _ in range(5):
        agent.turn()
    assert agent.state.actual_bytes == HELD
    assert agent.state.targets_rejected_total == 3
    assert caplog.text.count("num_pages is 16385, more than the 16384 pages that the machine has") == 1
    assert "not the host's target" in agent.state.reason
    assert agent.state.target_rejected
    assert agent.state.host_target_bytes == GUEST_SIZE + 3 * FRAME
    # All of it is a size that can be asked for, though hardly reached.
    agent.model.ask_for(GUEST_SIZE // FRAME)
    agent.rest()
    assert agent.state.actual_bytes == GUEST_SIZE
    assert not agent.state.target_rejected
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


# -- the device fails at the worst of times ------------------------------------------------------------------------------


def fail_at_next_notification(agent: Agent) -> None:
    def fail(model: BalloonModel) -> None:
        model.on_notification = lambda model: None
        model.break_down()

    agent.model.on_notification = fail


def lent_again(agent: Agent) -> None:
    """A holder died unheard, its frames came back through another one, and just then the device failed."""
    agent.kill_holder(heard=False)
    fail_at_next_notification(agent)
    agent.model.ask_for((HELD + 2 * MIB) // FRAME)
    agent.turn()
    assert agent.recovery.problem is not None
    # Taken, and not posted; and not given to the guest, for the host has these frames still.
    assert len(agent.world.balloon._unposted) == 1


def test_frames_that_the_host_has_still_are_kept_until_it_was_reset(agent: Agent) -> None:
    lent_again(agent)
    agent.rest()
    assert not agent.world.balloon._unposted
    assert agent.state.actual_bytes == HELD + 2 * MIB
    assert agent.state.holders_lost_total == 1
    agent.model.ask_for(0)
    agent.rest()
    assert 0 not in agent.world.guest.free


def test_what_was_taken_and_not_posted_goes_back_at_the_end_too(agent: Agent) -> None:
    lent_again(agent)
    agent.world.device.stop()
    release(sources(agent), agent.world.balloon, agent.world.device)
    assert 0 not in agent.world.guest.free


def test_a_block_that_was_not_posted_and_does_not_go_back_is_the_balloons(agent: Agent) -> None:
    world = agent.world
    (block,) = world.sources["blocks"].take(BLOCK_SIZE)
    world.balloon._unposted.append((world.sources["blocks"], block))
    world.sources["blocks"].give_back_problem = StillHeld("it does not come back")

    def fail_once_it_is(model: BalloonModel) -> None:
        if block.name in world.ledger:
            model.on_notification = lambda model: None
            world.sources["blocks"].give_back_problem = None
            model.break_down()

    agent.model.on_notification = fail_once_it_is
    agent.model.break_down()
    for _ in range(12):
        agent.turn(1.0)
    # Even if the device fails when it is told of it.
    assert faults(agent) == {"needs_reset": 2}
    assert not world.balloon._unposted
    world.sources["blocks"].give_back_problem = None
    agent.model.ask_for(0)
    agent.rest()
    assert 0 not in world.guest.free


@pytest.mark.parametrize("channel", ["cont", "reporting", "classic"])
def test_a_holder_that_dies_between_post_and_answer_is_guarded_until_the_host_was_told(channel: str) -> None:
    agent = Agent(World(MODERN | CONT | REPORTING | STATS, channel, quirks=Quirks(late=True), check_floor=False))
    agent.start()
    agent.model.ask_for(4 * MIB // FRAME)
    agent.turn()

    def die(model: BalloonModel) -> None:
        model.on_notification = still_guarded
        agent.kill_holder(heard=False)

    def still_guarded(model: BalloonModel) -> None:
        assert agent.world.sources["thp"].guarded

    agent.model.on_notification = die
    agent.model.ask_for(8 * MIB // FRAME - 512)
    agent.turn()
    agent.turn()
    assert agent.world.sources["thp"].guarded
    agent.holders.dead.append("h")
    agent.turn()
    agent.model.on_notification = lambda model: None
    agent.rest()
    assert agent.state.actual_bytes == 6 * MIB
    assert not agent.world.sources["thp"].guarded
    agent.close()


def test_a_pin_that_cannot_be_duplicated_just_now_costs_nothing_but_time(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def guard(extent: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(agent.world.sources["thp"], "guard", guard)
    agent.model.break_down()
    for _ in range(4):
        agent.turn()
    assert agent.state.state == "failed"
    assert agent.state.actual_bytes == HELD
    monkeypatch.undo()
    agent.rest()
    assert agent.state.actual_bytes == HELD
    assert len(agent.model.inflated) * FRAME == HELD


def test_commands_are_heard_while_much_is_announced(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balloon_agent.sizing.balloon.STEP", MIB)
    agent.model.break_down()
    agent.turn()
    number = agent.daemon.inbox.command(Mode.MANUAL, 5 * MIB)
    agent.turn()
    assert agent.state.state == "recovering"
    assert not agent.state.state.at_rest
    assert agent.state.commands_done == number
    # One that dies now has been announced already.
    agent.kill_holder(heard=True)
    agent.model.check_floor = False
    agent.rest()
    assert agent.state.actual_bytes == 5 * MIB
    assert agent.state.holders_lost_total == 1


def test_a_block_that_somebody_else_brought_online_leaves_the_balloon_when_its_frames_come_back(agent: Agent) -> None:
    world = agent.world
    block = next(extent for extent in world.ledger if extent.source == "blocks")
    # The guest has it, and the agent has not heard of it: so the balloon is too small for a moment.
    agent.model.check_floor = False
    world.sources["blocks"].lose(block)
    agent.model.ask_for(HELD // FRAME + 512)
    agent.rest()
    assert block.name not in world.ledger
    assert agent.state.actual_bytes == HELD + 2 * MIB
    agent.model.ask_for(0)
    agent.rest()
    assert 0 not in world.guest.free


def test_a_target_becomes_possible_when_memory_is_plugged_in(agent: Agent) -> None:
    most = [HELD]
    agent.daemon._target._physical = lambda: most[0]
    agent.model.ask_for(HELD // FRAME + 1)
    pause = 0.0
    for _ in range(5):
        pause = agent.turn(pause) or 0.0
    assert pause == LONGEST_RETRY
    assert agent.state.actual_bytes == HELD
    most[0] += FRAME
    for _ in range(5):
        pause = agent.turn(pause) or 0.0
    assert agent.state.actual_bytes == HELD + FRAME
    assert agent.turn(0.0) is None


def test_files_that_cannot_be_read_just_now_end_nothing(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(agent.daemon._target, "_physical", fails)
    monkeypatch.setattr(agent.world.balloon, "_spare", fails)
    monkeypatch.setattr(agent.statistics, "read", fails)
    agent.model.ask_for_stats()
    agent.model.ask_for(2 * HELD // FRAME)
    for _ in range(3):
        agent.turn(1.0)
    assert agent.state.state == "short"
    assert "Too many open files" in str(agent.state.shortfall)
    monkeypatch.undo()
    agent.rest()
    assert agent.state.actual_bytes == 2 * HELD
    agent.model.at_rest(2 * HELD // FRAME)


# -- a device that is told of much -------------------------------------------------------------------------------------


@pytest.fixture
def announcing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """About to tell a device, a piece of 2 MiB at a time, of all that an earlier agent has left. The host bears a loss."""
    monkeypatch.setattr(balloon_module, "STEP", 2 * MIB)
    demand = FakeDemand()
    world = World(MODERN | CONT | STATS | DEFLATE_ON_OOM)
    world.start()
    world.follow(LEFT)
    agent = Agent(world, RESERVE, demand)
    world.device.stop()
    world.device.start()
    agent.recovery.announce()
    agent.needs = demand.tell  # type: ignore[attr-defined]
    yield agent
    agent.close()
    demand.close()


def told(agent: Agent) -> int:
    """Bytes that the device has been told of since it was reset."""
    return len(agent.model.inflated) * FRAME


def test_a_start_with_much_to_announce_is_a_recovery_in_turns(announcing: Agent) -> None:
    announcing.turn()
    assert announcing.state.state == "recovering"
    assert 0 < told(announcing) < LEFT
    assert announcing.state.actual_bytes == LEFT
    number = announcing.daemon.inbox.command(Mode.MANUAL, LEFT - 4 * MIB)
    announcing.turn()
    assert announcing.state.commands_done == number
    assert announcing.state.state == "recovering"
    announcing.rest()
    assert announcing.state.state == "resting"
    assert told(announcing) == announcing.state.actual_bytes == LEFT - 4 * MIB
    assert faults(announcing) == {}


def test_who_needs_memory_meanwhile_gets_at_once_what_the_device_was_not_told_of(announcing: Agent) -> None:
    announcing.turn()
    before, guest = told(announcing), announcing.world.guest
    # Blocks are told of first here, and thp is what is quickest to give back.
    assert set(announcing.world.ledger.by_source()) == {"blocks", "thp", "pages"}
    guest.spare_frames = (RESERVE // 4) // FRAME
    announcing.needs()  # type: ignore[attr-defined]
    announcing.turn()
    assert announcing.state.state == "recovering"
    assert announcing.state.relief_active
    assert announcing.state.actual_bytes < LEFT
    assert told(announcing) - before <= BLOCK_SIZE, "it went on announcing first"
    guest.spare_frames = len(guest.free)
    announcing.rest()
    assert told(announcing) == announcing.state.actual_bytes == LEFT


def test_need_that_is_greater_than_what_is_left_to_tell_is_answered_after_that(announcing: Agent) -> None:
    guest = announcing.world.guest
    for _ in range(3):
        announcing.turn()
    guest.spare_frames = 0
    for _ in range(MOST_TURNS):
        announcing.needs()  # type: ignore[attr-defined]
        announcing.turn(1.0)
        if not announcing.state.actual_bytes:
            break
    assert announcing.state.actual_bytes == told(announcing) == 0


def test_a_block_that_does_not_come_back_in_need_is_announced_after_all(announcing: Agent) -> None:
    announcing.turn()
    for source in announcing.world.sources.values():
        source.give_back_problem = StillHeld("memory7 does not come back")
    announcing.world.guest.spare_frames = 0
    announcing.needs()  # type: ignore[attr-defined]
    announcing.turn()
    assert announcing.state.actual_bytes == LEFT
    for source in announcing.world.sources.values():
        source.give_back_problem = None
    announcing.world.guest.spare_frames = len(announcing.world.guest.free)
    announcing.rest()
    assert told(announcing) == announcing.state.actual_bytes == LEFT


def test_while_it_is_told_only_what_is_on_its_way_is_off_the_fuse(announcing: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    thp = announcing.world.sources["thp"]
    fuse: list[bool] = []
    monkeypatch.setattr(thp, "rest", fuse.append)
    while told(announcing) < LEFT:
        announcing.turn()
        assert fuse[-1] is True
        assert not thp.guarded
    # One that dies meanwhile is dealt with as ever; what it held is not told of, or taken back.
    announcing.rest()


@pytest.mark.parametrize("turns", [0, 1, 6, 30])
def test_a_holder_may_die_while_what_it_holds_is_told(announcing: Agent, turns: int) -> None:
    for _ in range(turns):
        announcing.turn()
    announcing.kill_holder(heard=True)
    announcing.rest()
    assert told(announcing) == announcing.state.actual_bytes == LEFT
    assert announcing.state.holders_lost_total == 1


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("keeps", [False, True])
def test_a_signal_while_it_is_told_ends_the_agent(announcing: Agent, keeps: bool) -> None:
    announcing.turn()
    announcing.daemon._policy = Policy(keeps=keeps)
    announcing.daemon._is_stopped = lambda: True
    assert announcing.daemon.run() is keeps
    silence(announcing.world.device, announcing.model)
    release(sources(announcing), announcing.world.balloon, announcing.world.device, lambda: keeps)
    assert announcing.world.balloon.actual == announcing.world.guest.free.count(0) * FRAME == (LEFT if keeps else 0)


def test_a_device_that_fails_while_it_is_told_is_told_anew(announcing: Agent) -> None:
    announcing.turn()
    fail_at_next_notification(announcing)
    announcing.rest()
    assert told(announcing) == announcing.state.actual_bytes == LEFT
    assert faults(announcing) == {"needs_reset": 1}


def test_a_command_is_heard_although_the_device_fails_in_the_same_moment(agent: Agent) -> None:
    break_down(agent)
    number = agent.daemon.inbox.command(Mode.MANUAL, 5 * MIB)
    agent.kill_holder(heard=True)
    fail_at_next_notification(agent)
    assert agent.turn() != 0
    assert agent.state.commands_done == number


# -- the end ------------------------------------------------------------------------------------------------------------


def sources(agent: Agent) -> list[Source]:
    return cast("list[Source]", list(agent.world.sources.values()))


@pytest.fixture
def signals() -> Iterator[None]:
    """The daemon's handlers go when the test is over."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def end(agent: Agent) -> None:
    """As after SIGTERM: the balloon is emptied, the device stopped, what is left is released."""
    agent.model.check_floor = False
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    agent.daemon.run()
    silence(agent.world.device, agent.model)
    release(sources(agent), agent.world.balloon, agent.world.device)


@pytest.mark.usefixtures("signals")
def test_at_the_end_everything_is_given_back(agent: Agent) -> None:
    end(agent)
    assert agent.world.balloon.actual == agent.model.actual == 0
    assert 0 not in agent.world.guest.free
    assert agent.model.status == 0
    assert not agent.model.bus_master


@pytest.mark.usefixtures("signals")
def test_a_signal_that_another_thread_hears_ends_the_agent_too(agent: Agent) -> None:
    """As does one just before the owner goes to sleep: its handler is called only when the owner runs again."""
    owner = Path(f"/proc/self/task/{threading.get_native_id()}/wchan")
    ended = threading.Event()
    in_time: list[bool] = []

    def stop() -> None:
        # Asleep, not about to be. Where the kernel does not tell, ten seconds are enough for that.
        limit = time.monotonic() + 10
        while "poll" not in owner.read_text() and time.monotonic() < limit:
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        in_time.append(ended.wait(60))
        agent.daemon.inbox.wake()

    agent.model.check_floor = False
    other = threading.Thread(target=stop)
    other.start()
    agent.daemon.run()
    ended.set()
    other.join()
    assert in_time == [True]


@pytest.mark.usefixtures("signals")
def test_a_device_that_fails_at_the_end_is_reset_and_then_everything_is_given_back(agent: Agent) -> None:
    fail_at_next_notification(agent)
    end(agent)
    assert agent.recovery.faults["needs_reset"] == 1
    assert 0 not in agent.world.guest.free


@pytest.mark.usefixtures("signals")
def test_a_device_that_cannot_be_reset_at_the_end_leaves_the_memory_where_it_is(agent: Agent) -> None:
    agent.model.quirks.stuck_reset = True
    agent.model.break_down()
    with pytest.raises(DeviceTimeout):
        end(agent)
    release(sources(agent), agent.world.balloon, agent.world.device)
    assert agent.world.guest.free.count(0) * FRAME == agent.world.balloon.actual > 0
    assert not agent.model.bus_master


def test_a_device_that_was_unplugged_is_no_reason_to_keep_memory(agent: Agent) -> None:
    agent.model.remove()
    for _ in range(3):
        agent.turn(1.0)
    assert faults(agent)["gone"] >= 1
    assert agent.state.state == "failed"
    assert agent.state.actual_bytes == HELD
    with pytest.raises(DeviceGone):
        agent.world.device.stop()
    release(sources(agent), agent.world.balloon, agent.world.device)
    assert 0 not in agent.world.guest.free


@pytest.fixture
def slotted() -> Iterator[tuple[Agent, Slot]]:
    """As ``agent``, with a device that can be unplugged, and followed by another."""
    world = World()
    slot = Slot(world)
    agent = Agent(world, slot=slot)
    agent.start()
    agent.model.ask_for(HELD // FRAME)
    agent.rest()
    yield agent, slot
    agent.close()
    slot.close()


def successor(agent: Agent) -> BalloonModel:
    """Another device for the same guest. All that it is told of must be held."""
    world = agent.world
    model = BalloonModel(frames=GUEST_SIZE // FRAME, guest=world.guest, check_floor=True)
    model.clock = agent.model.clock
    world.guest.on_use, world.guest.on_seize = model.guest_uses, model.guest_seizes
    return model


def test_with_the_device_its_memory_goes_and_the_next_device_gets_its_own(slotted: tuple[Agent, Slot]) -> None:
    agent, slot = slotted
    agent.model.remove()
    agent.turn()
    agent.rest()
    assert (agent.state.state, agent.state.actual_bytes, agent.state.host_target_bytes) == ("absent", 0, 0)
    assert agent.state.state.at_rest
    assert not agent.state.state.device_up
    assert agent.state.shortfall == "no virtio balloon here"
    assert 0 not in agent.world.guest.free
    assert faults(agent) == {"gone": 1}
    # Something else is plugged in; nothing is counted for that, and nothing more waited for.
    slot.plug(None)
    agent.rest()
    assert faults(agent) == {"gone": 1}
    # By hand nothing can be had, and whoever asks is told.
    number = agent.daemon.inbox.command(Mode.MANUAL, MIB)
    agent.rest()
    assert (agent.state.commands_done, agent.state.actual_bytes, agent.state.shortfall) == (number, 0, "no virtio balloon here")
    agent.daemon.inbox.command(Mode.FOLLOW, None)
    other = successor(agent)
    slot.plug(other)
    agent.follow(other)
    other.ask_for(5 * MIB // FRAME)
    agent.rest()
    assert (agent.state.state, agent.state.actual_bytes) == ("resting", 5 * MIB)
    other.ask_for(0)
    agent.rest()
    assert 0 not in agent.world.guest.free


def test_a_device_that_is_plugged_in_and_cannot_be_used_is_tried_again(slotted: tuple[Agent, Slot]) -> None:
    agent, slot = slotted
    agent.model.remove()
    agent.turn()
    agent.rest()
    # It never comes out of its reset.
    other = successor(agent)
    other.quirks.stuck_reset = True
    slot.plug(other)
    agent.follow(other)
    for _ in range(4):
        agent.turn(1.0)
    assert agent.state.state == "failed"
    other.quirks.stuck_reset = False
    other.ask_for(MIB // FRAME)
    agent.rest()
    assert agent.state.actual_bytes == MIB


@pytest.mark.parametrize("answers", [False, True])
def test_a_device_that_goes_between_two_buffers_is_not_touched_again(answers: bool) -> None:
    """Each notification of the classic queues is a store to a register, which kills who makes it where there is none."""
    world = World(MODERN | STATS, "classic")
    # In one step, of several notifications.
    world.balloon.enable(["thp", "pages"])
    agent = Agent(world)
    agent.start()

    def go(model: BalloonModel) -> None:
        if len(model.notifications) == 2:
            if answers:
                # It goes when it has acknowledged this one.
                model.quirks.removed = True
            else:
                model.remove()

    agent.model.on_notification = go
    agent.model.ask_for(40 * MIB // FRAME)
    for _ in range(20):
        agent.turn(1.0)
    assert faults(agent)["gone"] >= 1
    assert len(agent.model.notifications) == 2
    agent.close()


def test_what_was_not_posted_and_does_not_come_back_waits_for_the_next_device(slotted: tuple[Agent, Slot]) -> None:
    agent, slot = slotted
    lent_again(agent)
    for source in agent.world.sources.values():
        source.give_back_problem = StillHeld("not now")
    agent.model.remove()
    agent.turn()
    assert agent.state.state == "absent"
    assert agent.world.balloon._unposted
    for source in agent.world.sources.values():
        source.give_back_problem = None
    other = successor(agent)
    slot.plug(other)
    agent.follow(other)
    agent.rest()
    assert not agent.world.balloon._unposted
    assert agent.state.actual_bytes == 0
    assert 0 not in agent.world.guest.free


def test_a_device_that_has_failed_is_let_go_of_when_the_kernel_wants_it(slotted: tuple[Agent, Slot]) -> None:
    agent, _ = slotted
    agent.model.quirks.stuck_reset = True
    agent.model.break_down()
    for _ in range(5):
        agent.turn(1.0)
    assert agent.state.state == "failed"
    agent.model.quirks.stuck_reset = False
    wanted = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    agent.request_fd = wanted

    def serve() -> bool:
        os.eventfd_read(wanted)
        raise DeviceWanted("it is being unplugged")

    agent.serve_interrupt = serve  # type: ignore[method-assign]
    # Not with the next try, which is far away.
    before = agent.model.clock.now
    agent.turn()
    assert (agent.state.state, agent.state.actual_bytes) == ("absent", 0)
    assert agent.model.clock.now < before + 1
    os.close(wanted)


def test_questions_are_answered_without_a_device(slotted: tuple[Agent, Slot]) -> None:
    agent, _ = slotted
    agent.model.remove()
    agent.turn()
    agent.rest()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(agent.daemon.inbox.locate, 2 * MIB)
        while not answer.done():
            agent.turn()
    assert json.loads(answer.result()) == {"ok": True, "map": {}}


def test_a_device_that_cannot_be_silenced_keeps_its_memory_when_the_kernel_wants_it(slotted: tuple[Agent, Slot]) -> None:
    agent, _ = slotted
    agent.model.quirks.stuck_reset = True

    def wanted() -> None:
        raise DeviceWanted("it is being unplugged")

    agent.serve_interrupt = wanted  # type: ignore[assignment, method-assign]
    os.eventfd_write(agent.interrupt_fd, 1)
    for _ in range(3):
        agent.turn(1.0)
    assert agent.state.actual_bytes == HELD
    assert agent.world.guest.free.count(0) * FRAME == HELD
    assert faults(agent)["wanted"] == 1


def test_every_kind_of_fault_is_counted_from_the_start() -> None:
    assert {ConfigurationInvalid.kind, DeviceTimeout.kind, "used_ring", "needs_reset", "gone"} <= set(fault_kinds())
    recovery = Recovery(cast("BalloonDevice", None), cast("Balloon", None))
    assert recovery.faults == dict.fromkeys(fault_kinds(), 0)
