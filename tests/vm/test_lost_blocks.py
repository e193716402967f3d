"""Memory blocks that others bring online, and pools of huge pages that lie in blocks: on a real kernel, with a real udev."""

from __future__ import annotations

import json
import random
import time
from contextlib import AbstractContextManager

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, BIN, ctl_command, driving, running_agent
from contrib.vm.machine import Process
from tests.vm.conftest import Stage, kernel_driver_works, nothing_left
from tests.vm.tools import pattern, scrape, status

MIB_OF_GUEST = 1536
TARGETS = 60
# Seconds of rest after which what is said must be true: it is a bound on how late the agent hears, not on how fast it works.
TRUE_WITHIN = 2.0
# As distributions ship it for memory that is plugged in.
RULE = 'SUBSYSTEM=="memory", ACTION=="add|change", ATTR{state}=="offline", ATTR{state}="online"'
RULES = "/run/udev/rules.d/41-memory.rules"
# In the guest: brings every block online once a second, as a rule does, and one of them at random in between.
MEDDLE = """
import glob, os, random, select, subprocess, sys, time
random.seed(7)
print("meddling", flush=True)
trigger = 0.0
count = 0
while not select.select([0], [], [], random.uniform(0.05, 0.5))[0]:
    if time.monotonic() >= trigger:
        trigger = time.monotonic() + 1
        action = random.choice(["add", "change"])
        subprocess.run(["udevadm", "trigger", f"--action={action}", "--subsystem-match=memory"], check=True)
    path = random.choice(glob.glob("/sys/devices/system/memory/memory*/state"))
    try:
        with open(path, "r+") as file:
            if file.read().strip() == "offline":
                count += 1
                os.write(file.fileno(), b"online")
    except OSError:
        pass
print("brought online:", count)
"""
# In the guest: waits until the balloon rests at this target, and what it says is true. For how long it rested and said what was
# not true: not while it moves, since it is on its way to take as much elsewhere then.
TRUE_AT_REST = """
import glob, json, socket, sys, time
stream = socket.socket(socket.AF_UNIX)
stream.connect("/run/balloon-agent/control")
lines = stream.makefile("rwb")
def status():
    lines.write(b'{"op": "status"}\\n')
    lines.flush()
    return json.loads(lines.readline())["status"]
def offline():
    return sum(open(path).read().strip() == "offline" for path in glob.glob("/sys/devices/system/memory/memory*/state"))
deadline, wrong_since, longest = time.monotonic() + 240, None, 0.0
while True:
    first, before, now = status(), offline(), status()
    held = now["held_bytes"]
    rests = now["state"] in ("resting", "short") and now["host_target_bytes"] == int(sys.argv[1])
    rests = rests and now["number"] == first["number"]
    is_true = before == offline() and held.get("blocks", 0) == before << 27 and sum(held.values()) == now["actual_bytes"]
    wrong_since = None if is_true or not rests else wrong_since or time.monotonic()
    if wrong_since is not None:
        longest = max(longest, time.monotonic() - wrong_since)
    if rests and is_true:
        break
    assert time.monotonic() < deadline, (before, now)
    time.sleep(0.02)  # the agent has the same processor
print(json.dumps({"seconds": longest, "status": now}))
"""
# In the guest, in place of balloon-agent: for how long blocks rest.
START = """
import sys
from balloon_agent.memory.sources import block_choice, intrusions
{rests}
from balloon_agent.cli.agent import main
sys.exit(main(["run"]))
"""
# A second, so that there are always some to be brought online.
IMPATIENT = """
intrusions.FIRST_REST = intrusions.LONGEST_REST = 1.0
block_choice.FAILED_BLOCK_REST = block_choice.LONGEST_REST = 1.0
"""
# Longer than the test, in however slow a guest.
PATIENT = "intrusions.FIRST_REST = 3600.0"
INSIST = "for s in /sys/devices/system/memory/memory*/state; do if grep -qx offline $s; then echo online >$s; fi; done"


@pytest.fixture
def hotplug(stage: Stage) -> VirtualMachine:
    return stage.machine("hotplug", lambda: VirtualMachine(MIB_OF_GUEST, devices=[BALLOON_DEVICE], cache=True))


def agent(machine: VirtualMachine, rests: str) -> AbstractContextManager[Process]:
    return driving(machine.start([str(BIN / "python"), "-c", START.format(rests=rests)]))


def oom_kills(machine: VirtualMachine) -> str:
    return machine.shell("grep oom_kill /proc/vmstat")


@pytest.mark.long
def test_blocks_that_others_bring_online_leave_the_balloon_and_corrupt_nothing(hotplug: VirtualMachine) -> None:
    """A rule that onlines memory, and somebody who does so at random, beside targets up and down and the pattern process."""
    killed = oom_kills(hotplug)
    hotplug.shell(f"mkdir -p {RULES.rpartition('/')[0]} && echo '{RULE}' >{RULES} && udevadm control --reload")
    targets = random.Random(18)
    worst = 0.0
    with pattern(hotplug), agent(hotplug, IMPATIENT):
        meddler = hotplug.start([str(BIN / "python"), "-I", "-S", "-c", MEDDLE], keep_stdin=True)
        meddler.wait_for("meddling", 60)
        for _ in range(TARGETS):
            guest = targets.choice([MIB_OF_GUEST, 512, 600, 777, 901, 1024, 1155, 1300, 1500])
            hotplug.set_balloon(guest)
            target = (MIB_OF_GUEST - guest) << 20
            found = json.loads(
                hotplug.run([str(BIN / "python"), "-I", "-S", "-c", TRUE_AT_REST, str(target)], timeout=300).check().out
            )
            worst = max(worst, found["seconds"])
            deadline = time.monotonic() + 60
            while (told := (MIB_OF_GUEST << 20) - hotplug.balloon_actual()) != (now := status(hotplug))["actual_bytes"]:
                assert time.monotonic() < deadline, (told, now)
        meddler.close_stdin()
        meddled = meddler.wait(60).check().out
        now = status(hotplug)
        print(f"at rest and not true for {worst:.3f} s at worst; {meddled.strip()}; lost {now['blocks_lost_total']}")
        assert worst < TRUE_WITHIN
        assert now["blocks_lost_total"] > TARGETS // 4, "hardly a block was lost"
        assert scrape(hotplug)["balloon_blocks_lost_total"] == now["blocks_lost_total"]
        assert oom_kills(hotplug) == killed
        hotplug.shell(f"rm {RULES} && udevadm control --reload")
        # Nobody insists any more: each size can be reached, as before.
        for guest in (600, MIB_OF_GUEST):
            hotplug.set_balloon(guest)
            hotplug.wait_balloon(guest, 120)
    nothing_left(hotplug)
    kernel_driver_works(hotplug)


def test_whoever_insists_on_bringing_blocks_online_is_named_and_blocks_rest(hotplug: VirtualMachine) -> None:
    with agent(hotplug, PATIENT) as patient:
        hotplug.set_balloon(768)
        hotplug.wait_balloon(768, 120)
        assert status(hotplug)["held_bytes"] == {"blocks": 768 << 20}
        deadline = time.monotonic() + 240
        while "blocks" in (now := status(hotplug))["held_bytes"] or now["actual_bytes"] != 768 << 20:
            assert time.monotonic() < deadline, now
            hotplug.shell(INSIST)
        # Those, and perhaps some that were taken in their place before it showed that somebody insists.
        assert now["blocks_lost_total"] >= 6
        assert now["state"] == "resting"
        # As long as something is to be taken, and blocks are not.
        hotplug.set_balloon(512)
        hotplug.wait_balloon(512, 120)
        assert "somebody else brings them online again and again (memory" in hotplug.run(ctl_command("status")).check().out
        assert patient.err.count("no blocks are taken for now") == 2, "once as a warning, once as the reason of the source"
        hotplug.set_balloon(MIB_OF_GUEST)
        hotplug.wait_balloon(MIB_OF_GUEST, 120)
    nothing_left(hotplug)


def test_pools_of_huge_pages_are_as_large_as_before(hotplug: VirtualMachine) -> None:
    """Free ones are in the blocks that are taken first, at the end of memory, and in the way of those that make room, too."""
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    hotplug.shell(f"echo 24 >{pool}")
    assert hotplug.shell(f"cat {pool}").strip() == "24"
    try:
        for sources in ("blocks,thp,pages", "thp,pages"):
            with pattern(hotplug), running_agent(hotplug, "--sources", sources):
                for guest in (600, 1100, 501):
                    hotplug.set_balloon(guest)
                    hotplug.wait_balloon(guest, 180)
                    assert hotplug.shell(f"cat {pool}").strip() == "24", (sources, guest)
                hotplug.set_balloon(MIB_OF_GUEST)
                hotplug.wait_balloon(MIB_OF_GUEST, 120)
    finally:
        hotplug.shell(f"echo 0 >{pool}")
    nothing_left(hotplug)
