"""A program begins to need memory in a guest with a large balloon: it gets it in time, and nobody is killed but holders."""

from __future__ import annotations

import math
import signal

import pytest

from balloon_agent.agent.stock import LEAST_CAPACITY
from contrib.benchmarks import pressure
from contrib.vm import VirtualMachine
from contrib.vm.experiment import STEP_DEADLINE, agent_command, ctl_command, running_agent
from contrib.vm.workload import guestmem
from tests.vm.conftest import Stage, nothing_left

# So that the balloon returns soon, for the next program to need it.
IMPATIENT = ("--relief-cooldown", "0.05")


@pytest.fixture
def guest(stage: Stage) -> VirtualMachine:
    return stage.machine("pressed", pressure.boot)


# Five programs of each kind are in tests/run, and twenty in tests/long.
KINDS = [(kind, 5) for kind in ("thp", "blocks", "fuse", "zram")]
MANY = [pytest.param(kind, 20, marks=pytest.mark.long) for kind in ("thp", "blocks", "zram")]


@pytest.mark.parametrize(("kind", "runs"), [*KINDS, *MANY])
def test_who_needs_memory_gets_it(guest: VirtualMachine, kind: str, runs: int) -> None:
    lines: list[str] = []
    needs = pressure.needs(guest, kind, runs, lines.append, IMPATIENT)
    told = "\n".join(lines)
    assert len(needs) == runs
    for need in needs:
        assert need.seconds is not None, told
        assert need.balloon_mib <= pressure.GUEST_MIB - pressure.NEEDED_MIB, told
        assert len(need.killed) == need.oom_kills, told
        assert all(name.endswith(" 1000") for name in need.killed), told
        # Holders are what the fuse is made of, and all that there is without relief; who hears of need in time loses none.
        assert bool(need.killed) == (kind == "fuse"), told
    # And of these no more than what is needed, with an exception perhaps: the OOM killer waits for what it has won.
    needed = math.ceil((pressure.NEEDED_MIB << 20) / LEAST_CAPACITY)
    assert sorted(len(need.killed) for need in needs)[runs // 2] <= needed, told
    nothing_left(guest)
    assert guest.shell("cat /proc/sys/vm/overcommit_memory /proc/sys/vm/watermark_scale_factor").split() == ["0", "10"]


def test_who_needs_memory_while_the_balloon_grows_gets_it(guest: VirtualMachine) -> None:
    """Enough for two programs and for less of a balloon, of which each piece means that memory is moved for a while."""
    oom_kills = int(guest.shell(f"dmesg --clear; {pressure.OOM_KILLS}").split()[1])
    with running_agent(guest, "--sources", "blocks,thp,pages", *IMPATIENT) as agent:
        for _ in range(4):
            # Every second page of its memory, so that it has some in each block.
            first = guest.start([str(guestmem()), "punch", "700"], keep_stdin=True)
            first.wait_for("ready", STEP_DEADLINE)
            guest.run(ctl_command("set", "350M", "--no-wait")).check()
            second = guest.start([str(guestmem()), "touch", "350"], keep_stdin=True)
            second.wait_for("ready", STEP_DEADLINE)
            for user in (first, second):
                user.close_stdin()
                user.wait(STEP_DEADLINE).check()
            guest.run(ctl_command("deflate"), timeout=STEP_DEADLINE).check()
        killed = guest.shell(pressure.KILLED).splitlines()
        assert all(name.endswith(" 1000") for name in killed), agent.err
        assert int(guest.shell(pressure.OOM_KILLS).split()[1]) - oom_kills == len(killed)
        guest.run(ctl_command("follow")).check()
    nothing_left(guest)


def test_need_that_cannot_be_heard_of_is_seen_in_time(guest: VirtualMachine) -> None:
    """Without tracefs there is no tracepoint."""
    mounts = guest.shell("grep -E ' (tracefs|debugfs) ' /proc/mounts || true").splitlines()
    places = [mount.split()[1] for mount in mounts]
    for place in sorted(places, key=len, reverse=True):
        guest.shell(f"umount {place}")
    try:
        with running_agent(guest, "--sources", "thp,pages", *IMPATIENT) as agent:
            assert "need of memory is looked for" in agent.err
            guest.run(ctl_command("set", "700M"), timeout=STEP_DEADLINE).check()
            user = guest.start([str(guestmem()), "touch", "600"], keep_stdin=True)
            user.wait_for("ready", STEP_DEADLINE)
            assert "lost" not in guest.run(ctl_command("status")).check().out
            user.close_stdin()
            user.wait(STEP_DEADLINE).check()
            guest.wait_balloon(pressure.GUEST_MIB - 700, STEP_DEADLINE)
    finally:
        guest.shell("mount -t debugfs none /sys/kernel/debug; mount -t tracefs none /sys/kernel/tracing")
    nothing_left(guest)


def test_a_killed_agent_leaves_the_settings_to_the_next(guest: VirtualMachine) -> None:
    settings = "cat /proc/sys/vm/overcommit_memory /proc/sys/vm/watermark_scale_factor"
    before = guest.shell(settings).split()
    first = guest.start(agent_command("run"))
    first.wait_for("driving", STEP_DEADLINE)
    guest.run(ctl_command("set", "300M"), timeout=STEP_DEADLINE).check()
    during = guest.shell(settings).split()
    assert during[0] == "1"
    assert int(during[1]) > int(before[1])
    first.signal(signal.SIGKILL)
    first.wait(STEP_DEADLINE)
    with running_agent(guest):
        # What was asked for by hand is asked for still.
        guest.wait_balloon(pressure.GUEST_MIB - 300, STEP_DEADLINE)
        assert guest.shell(settings).split()[0] == "1"
        guest.run(ctl_command("follow"), timeout=STEP_DEADLINE).check()
    assert guest.shell(settings).split() == before
    nothing_left(guest)
