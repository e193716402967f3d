"""Guest memory in a real machine: what is held stays where it is, whoever dies nothing is lost, and all of it goes back."""

from __future__ import annotations

import json
import signal
import time

from contrib.vm import Process, VirtualMachine
from contrib.vm.experiment import BIN, STEP_DEADLINE, agent_command, ctl_command, running_agent
from contrib.vm.workload import guestmem
from tests.vm.conftest import MEMORY_MIB, driver_of_balloon, kernel_driver_works, nothing_left
from tests.vm.tools import pattern, pools, pools_become, scrape, status

PYTHON = str(BIN / "python")
# What the guest is to keep: more than it is in need of, whatever the sources are.
SMALLER = 700
# In the guest, in place of balloon-agent: kills the holder of what was just translated, before the host hears of it, and looks
# at the frames when the host has answered, and when the agent has dealt with the death.
KILL_IN_FLIGHT = """
import os, signal, sys, time
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.memory.holders import Holders
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.sizing.balloon import Balloon
BUDDY, NOPAGE = 1 << 10, 1 << 20
pagemap = Pagemap()
inflate, died, lost = BalloonDevice.inflate, [], Balloon.holder_lost
started = Holders.start
holders = []
def start(self, **options):
    client = started(self, **options)
    holders.append(client)
    return client
def free(runs):
    heads = [run.first for run in runs]
    return sum(flags & (BUDDY | NOPAGE) > 0 or not huge for flags, huge in zip(pagemap.flags(heads), pagemap.are_huge(heads)))
def killing(self, runs):
    if not died:
        died.extend(runs)
        os.kill(holders[0].pid, signal.SIGKILL)
        while "Z" not in open(f"/proc/{holders[0].pid}/stat").read().split()[2]:
            pass
        print("free before the host has answered:", free(runs), flush=True)
        inflate(self, runs)
        print("free after its answer:", free(runs), flush=True)
    else:
        inflate(self, runs)
def dealing(self, holder, **options):
    result = lost(self, holder, **options)
    deadline = time.monotonic() + 60
    while free(died) < len(died) and time.monotonic() < deadline:
        time.sleep(0.01)
    print("free in the end:", free(died), "of", len(died), flush=True)
    return result
BalloonDevice.inflate, Balloon.holder_lost, Holders.start = killing, dealing, start
from balloon_agent.cli.agent import main
sys.exit(main(["run", "--sources", "thp"]))
"""


ON_THE_FUSE = """
import pathlib
from balloon_agent.memory.holders import Holders
holders = Holders(pathlib.Path("/tmp/fuse"))
first = holders.start()
for holder in (first, holders.start()):
    adjustment = pathlib.Path(f"/proc/{holder.pid}/oom_score_adj")
    # At once, and not only when it is up.
    holder.set_fuse(True)
    print(adjustment.read_text().strip())
    holder.request({"op": "hello"})
    print(adjustment.read_text().strip())
    holder.set_fuse(False)
    print(adjustment.read_text().strip())
holders.close(lambda name: True)
"""


def test_a_holder_that_has_just_come_up_is_on_the_fuse_when_it_is_to_be(machine: VirtualMachine) -> None:
    """It protects itself first of all, which is not the last word."""
    assert machine.run([PYTHON, "-c", ON_THE_FUSE], timeout=STEP_DEADLINE).check().out.split() == ["1000", "1000", "-1000"] * 2


def test_frames_in_flight_outlive_a_holder_that_is_killed(machine: VirtualMachine) -> None:
    with pattern(machine):
        machine.set_balloon(MEMORY_MIB - 8)
        agent = machine.start([PYTHON, "-c", KILL_IN_FLIGHT])
        agent.wait_for("free in the end: ", 120)
        agent.wait_for("the balloon has 8 MiB", 60)
        now = status(machine)
        assert now["actual_bytes"] == 8 << 20
        assert now["holders_lost_total"] == 1
        machine.wait_balloon(MEMORY_MIB - 8, 60)
        agent.signal(signal.SIGTERM)
        agent.wait(60).check()
    told = dict(line.rsplit(": ", 1) for line in agent.out.splitlines() if line.startswith("free"))
    assert told["free before the host has answered"] == "0"
    assert told["free after its answer"] == "0"
    free, _, of = told["free in the end"].partition(" of ")
    assert free == of != "0"


def left_in_the_middle(machine: VirtualMachine, *options: str) -> Process:
    """An agent that was killed when it had some of what the host asks for, and was about to take more."""
    machine.set_balloon(SMALLER)
    agent = machine.start(agent_command("run", "--verbose", *options))
    agent.wait_for(f"is to have {MEMORY_MIB - SMALLER} MiB", 120)
    # Its steps are seen in the host's view of the balloon.
    deadline = time.monotonic() + 60
    while machine.balloon_actual() >> 20 in (MEMORY_MIB, SMALLER):
        assert time.monotonic() < deadline, agent.err
    agent.signal(signal.SIGKILL)
    agent.wait(60)
    return agent


def test_an_agent_killed_in_the_middle_is_followed_by_one_that_goes_on_exactly(machine: VirtualMachine) -> None:
    before = pools(machine)
    with pattern(machine):
        left_in_the_middle(machine, "--sources", "hugetlb,thp,pages")
        with running_agent(machine, "--sources", "hugetlb,thp,pages") as agent:
            agent.wait_for("left", 60)
            machine.wait_balloon(SMALLER, 120)
            machine.run(ctl_command("deflate")).check()
            assert machine.balloon_actual() == MEMORY_MIB << 20
            assert status(machine)["held_bytes"] == {}
            pools_become(machine, before)
    kernel_driver_works(machine)


def test_what_a_killed_agent_has_left_is_restored(machine: VirtualMachine) -> None:
    total, minimum = machine.shell("grep MemTotal /proc/meminfo"), machine.shell("cat /proc/sys/vm/min_free_kbytes")
    before = pools(machine)
    with pattern(machine):
        left_in_the_middle(machine, "--sources", "blocks,hugetlb,thp,pages", "--reserve", "16M")
        assert driver_of_balloon(machine) == "uio_pci_generic"
        machine.set_balloon(MEMORY_MIB)
        restored = machine.run(agent_command("restore")).check()
        assert "is online again" in restored.err
        pools_become(machine, before)
        assert machine.shell("grep MemTotal /proc/meminfo") == total
        assert machine.shell("cat /proc/sys/vm/min_free_kbytes") == minimum
        nothing_left(machine)
        assert "nothing to restore" in machine.run(agent_command("restore")).check().err
    kernel_driver_works(machine)


# What the kernel chooses for vm.min_free_kbytes with one block less, the first that goes, and with that back again.
CHOICES = """
for block in $(ls -dr /sys/devices/system/memory/memory*); do
    echo offline >$block/state 2>/dev/null || continue
    cat /proc/sys/vm/min_free_kbytes
    echo online >$block/state
    cat /proc/sys/vm/min_free_kbytes
    exit
done
"""


def test_the_kernel_chooses_its_watermark_after_an_agent_as_before(machine: VirtualMachine) -> None:
    chosen = machine.shell(CHOICES).split()
    assert int(chosen[0]) < int(chosen[1])
    with running_agent(machine, "--sources", "thp,pages"):
        machine.run(ctl_command("set", "400M"), timeout=120).check()
        assert int(machine.shell("cat /proc/sys/vm/min_free_kbytes")) < int(chosen[1])
        machine.run(ctl_command("deflate"), timeout=120).check()
        assert machine.shell("cat /proc/sys/vm/min_free_kbytes").split() == chosen[1:]
        assert machine.shell(CHOICES).split() == chosen
        machine.run(ctl_command("follow"), timeout=120).check()


# Runs a command that may not use io_uring, as under a container's seccomp filter: the two calls fail with EPERM.
WITHOUT_IO_URING = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def op(code, jt, jf, k): return struct.pack("<HBBI", code, jt, jf, k)
program = op(0x20, 0, 0, 0) + op(0x35, 0, 2, 425) + op(0x25, 1, 0, 427) + op(0x06, 0, 0, 0x50001) + op(0x06, 0, 0, 0x7FFF0000)
class Filter(ctypes.Structure): _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program) // 8, program))) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def without_io_uring(*options: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", WITHOUT_IO_URING, *agent_command("run", *options)]


def test_where_io_uring_is_forbidden_only_whole_blocks_are_taken(machine: VirtualMachine) -> None:
    refused = machine.run(without_io_uring("--sources", "thp,pages"))
    assert refused.code == 1
    assert "set kernel.io_uring_disabled=0; or add `blocks` to --sources" in refused.err
    assert driver_of_balloon(machine) == "virtio-pci"
    with pattern(machine):
        agent = machine.start(without_io_uring())
        agent.wait_for("driving", 120)
        short = machine.run(ctl_command("set", "140M", "--json"))
        assert short.code == 3
        now = json.loads(short.out)
        assert now["held_bytes"] == {"blocks": 128 << 20}
        assert "set kernel.io_uring_disabled=0" in now["shortfall"]
        machine.run(ctl_command("set", "128M")).check()
        agent.signal(signal.SIGTERM)
        agent.wait(60).check()


def test_memory_without_a_pin_is_an_experiment_and_says_so(machine: VirtualMachine) -> None:
    agent = machine.start(without_io_uring("--sources", "thp,pages", "--allow-unpinned"))
    agent.wait_for("driving", 120)
    assert "memory is NOT PINNED (--allow-unpinned)" in agent.err
    done = machine.run(ctl_command("set", "9M")).check()
    assert "UNPINNED" in done.out
    assert scrape(machine)["balloon_unpinned"] == 1
    machine.run(ctl_command("set", "0")).check()
    agent.signal(signal.SIGTERM)
    agent.wait(60).check()


def test_an_inflate_swaps_nothing_out_and_kills_nobody(machine: VirtualMachine) -> None:
    """A guest that is in use, with swap: the balloon takes what can be spared, says what it lacks, and leaves it at that."""

    def counted() -> dict[str, int]:
        lines = machine.shell("cat /proc/vmstat").splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines) if name in ("pswpout", "oom_kill")}

    machine.shell("modprobe zram && echo 300M >/sys/block/zram0/disksize && mkswap /dev/zram0 && swapon /dev/zram0")
    user = machine.start([str(guestmem()), "touch", "450"], keep_stdin=True)
    try:
        user.wait_for("ready", 120)
        with running_agent(machine):
            before = counted()
            assert before.keys() == {"pswpout", "oom_kill"}
            short = machine.run(ctl_command("set", "600M", "--timeout", "60", "--json"))
            assert short.code == 3, short
            now = json.loads(short.out)
            assert now["state"] == "short"
            assert "64 MiB of it are kept in reserve" in now["shortfall"]
            assert now["actual_bytes"] > 100 << 20
            assert counted() == before
            machine.run(ctl_command("deflate")).check()
    finally:
        user.close_stdin()
        user.wait(60).check()
        machine.shell("swapoff /dev/zram0 && rmmod zram")
