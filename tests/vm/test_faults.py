"""A device that fails under a running agent, statistics, and an agent with nothing to do: on a real machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from contrib.vm import GuestError, Process, VirtualMachine
from contrib.vm.experiment import agent_command, ctl_command, running_agent
from tests.vm.conftest import MEMORY_MIB, address_of_balloon, kernel_driver_works
from tests.vm.tools import pattern, plug, scrape, status, unplug

# Runs in the guest, beside the agent: it does to the device what only a host or a broken device would. QEMU has the common
# configuration at the start of BAR 4, and the notifications at 0x3000.
MEDDLE = """
import mmap, os, struct, sys
address, agent, what = sys.argv[1:]
bar = mmap.mmap(os.open(f"/sys/bus/pci/devices/{address}/resource4", os.O_RDWR), 0x4000)
if what == "reset":
    bar[0x14] = 0
    sys.exit()

def register(offset, size):
    return int.from_bytes(bar[offset : offset + size], "little")

# The highest queue that is enabled is the one that takes memory back.
for queue in reversed(range(register(0x12, 2))):
    bar[0x16:0x18] = struct.pack("<H", queue)
    if register(0x1C, 2):
        break
ring = register(0x28, 4) | register(0x2C, 4) << 32
pagemap = os.open(f"/proc/{agent}/pagemap", os.O_RDONLY)
for line in open(f"/proc/{agent}/maps"):
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    pages = (end - begin) // 4096
    entries = os.pread(pagemap, 8 * pages, begin // 4096 * 8) if pages < 1 << 18 else b""
    for number, (entry,) in enumerate(struct.iter_unpack("<Q", entries)):
        if entry & (1 << 55) - 1 == ring // 4096:
            # One more buffer, whose number cannot be, wherever in the ring it is: the device gives up, and says so.
            memory = os.open(f"/proc/{agent}/mem", os.O_RDWR)
            place = begin + 4096 * number
            (index,) = struct.unpack("<H", os.pread(memory, 2, place + 2))
            os.pwrite(memory, struct.pack("<H", index + 1) + bytes([255, 255]) * register(0x18, 2), place + 2)
            bar[0x3000 + 4 * queue : 0x3002 + 4 * queue] = struct.pack("<H", queue)
            sys.exit()
sys.exit("the ring is nowhere")
"""


NEEDS_RESET = 'balloon_device_faults_total{kind="needs_reset"}'


def meddle(machine: VirtualMachine, agent: Process, what: str) -> None:
    machine.run(["python3", "-I", "-S", "-c", MEDDLE, address_of_balloon(machine), str(agent.pid), what]).check()


def test_a_device_that_was_reset_is_brought_back_with_all_that_the_balloon_holds(machine: VirtualMachine) -> None:
    with pattern(machine), running_agent(machine) as agent:
        machine.set_balloon(600)
        agent.wait_for("the balloon has 424 MiB", 120)
        meddle(machine, agent, "reset")
        # A device says nothing of that; it is noticed with the next thing that is to be done.
        machine.run(ctl_command("set", "430M")).check()
        machine.wait_balloon(MEMORY_MIB - 430, 60)
        assert agent.err.count("device fault: ") == 1
        assert "device_status is 0x0, not 0xf: it was reset by somebody else" in agent.err
        # What was on its way is announced too.
        assert "the device works again, by its cont queues; 4" in agent.err
        assert scrape(machine)['balloon_device_faults_total{kind="was_reset"}'] == 1
        machine.set_balloon(700)
        machine.run(ctl_command("follow")).check()
        machine.wait_balloon(700, 60)
        assert "was_reset 1" in machine.run(ctl_command("status")).check().out
    kernel_driver_works(machine)


def test_a_device_that_needs_a_reset_says_so_and_gets_one(machine: VirtualMachine) -> None:
    with pattern(machine), running_agent(machine) as agent:
        for turn in (1, 2):
            machine.set_balloon(600 + turn)
            machine.wait_balloon(600 + turn, 120)
            meddle(machine, agent, "break")
            # Nobody asked the agent for anything: the device's interrupt is what it hears.
            until(lambda turn=turn: scrape(machine)[NEEDS_RESET] == turn, "the fault to be noticed")
        # Once, not for each of the two.
        assert agent.err.count("device_status is 0x4f, not 0xf: it needs a reset") == 1
        assert agent.err.count("the device works again, by its cont queues; 423 MiB announced anew") == 1
        assert machine.log().count("Guest says index 65535 is available") == 2
        machine.set_balloon(900)
        machine.wait_balloon(900, 60)
        figures = scrape(machine)
        assert figures[NEEDS_RESET] == 2
        assert figures["balloon_device_up"] == 1
    kernel_driver_works(machine)


def test_an_agent_whose_device_is_unplugged_gives_the_memory_back_and_can_be_stopped(machine: VirtualMachine) -> None:
    total = machine.shell("grep MemTotal /proc/meminfo")
    agent = machine.start(agent_command("run"))
    agent.wait_for("driving", 120)
    machine.set_balloon(600)
    agent.wait_for("the balloon has 424 MiB", 120)
    unplug(machine)
    agent.wait_for("is not there any more", 60)
    until(lambda: status(machine)["state"] == "absent", "the memory to be given back")
    assert status(machine)["actual_bytes"] == 0
    assert machine.shell("grep MemTotal /proc/meminfo") == total
    assert scrape(machine)["balloon_device_up"] == 0
    agent.signal(signal.SIGTERM)
    ended = agent.wait(60).check()
    plug(machine, cont_pages=True)
    kernel_driver_works(machine)
    assert machine.shell("grep MemTotal /proc/meminfo") == total, ended.err


def until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise GuestError(f"waited 60 s for {what}")
        time.sleep(0.05)


# -- statistics -------------------------------------------------------------------------------------------------------

ABSENT = (1 << 64) - 1
BALLOON = "/machine/peripheral/balloon1"


@contextmanager
def polled(machine: VirtualMachine) -> Iterator[None]:
    """QEMU asks for statistics every second."""
    machine.qmp("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=1)
    yield
    machine.qmp("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=0)


def next_statistics(machine: VirtualMachine, count: int = 2) -> dict[str, int]:
    """What QEMU shows after so many further answers; those that the guest does not give are left out."""

    def answer() -> dict[str, dict[str, int]]:
        shown: dict[str, dict[str, int]] = machine.qmp("qom-get", path=BALLOON, property="guest-stats")
        return shown

    for _ in range(count):
        last = answer()["last-update"]
        until(lambda last=last: answer()["last-update"] != last, "statistics")
    return {name: value for name, value in answer()["stats"].items() if value != ABSENT}


def test_the_host_sees_the_guests_statistics(machine: VirtualMachine) -> None:
    with polled(machine):
        kernels = next_statistics(machine)
        with running_agent(machine):
            ours = next_statistics(machine)
            total = int(machine.shell("grep MemTotal /proc/meminfo").split()[1]) << 10
            # All that the guest's own driver gives, and QEMU knows.
            assert ours.keys() == kernels.keys()
            assert len(ours) == 10
            assert ours["stat-total-memory"] == total
            assert 0 < ours["stat-free-memory"] <= ours["stat-available-memory"] + (64 << 20)
            assert 0 < ours["stat-available-memory"] < total
            assert ours["stat-minor-faults"] > ours["stat-major-faults"] > 0
            assert 0 < ours["stat-disk-caches"] < total
            # They go on while memory moves, and after the device was brought back.
            machine.set_balloon(700)
            machine.wait_balloon(700, 60)
            assert next_statistics(machine)["stat-free-memory"] < ours["stat-free-memory"]
            machine.set_balloon(MEMORY_MIB)
            machine.wait_balloon(MEMORY_MIB, 60)
    kernel_driver_works(machine)


# -- nothing to do ------------------------------------------------------------------------------------------------------

IDLE_SECONDS = 60
COUNT_SWITCHES = """
for pid in $(pgrep -f 'balloon[-_]agent'); do
  for task in /proc/$pid/task/*; do
    echo $pid ${task##*/} $(grep ^voluntary $task/status)
  done
done
"""


def switches(machine: VirtualMachine) -> dict[tuple[int, int], int]:
    """Voluntary context switches so far, by process and thread, of the agent and its holders."""
    lines = (line.split() for line in machine.shell(COUNT_SWITCHES).splitlines())
    return {(int(pid), int(task)): int(count) for pid, task, _, count in lines}


def test_an_idle_agent_sleeps(machine: VirtualMachine) -> None:
    with running_agent(machine) as agent:
        machine.set_balloon(600)
        agent.wait_for("the balloon has 424 MiB", 120)
        scrape(machine)
        before = switches(machine)
        # The agent with its threads, and at least one holder.
        assert len({pid for pid, _ in before}) >= 2
        time.sleep(IDLE_SECONDS)
        assert switches(machine) == before
        # A scrape wakes the thread that serves it, and not the one that owns the balloon.
        scrape(machine)
        after = switches(machine)
        assert agent.pid is not None
        assert after[agent.pid, agent.pid] == before[agent.pid, agent.pid]
        assert sum(after.values()) > sum(before.values())
