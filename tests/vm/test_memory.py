"""Guest memory in a real machine: what is held stays where it is, whoever dies nothing is lost, and all of it goes back."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from contrib.vm import Process, VirtualMachine
from contrib.vm.experiment import BIN, agent_command, ctl_command, running_agent
from tests.vm.conftest import MEMORY_MIB, driver_of_balloon, kernel_driver_works, nothing_left
from tests.vm.tools import breathe, pattern, scrape, status

LARGE_MIB = 5120
PYTHON = str(BIN / "python")
COMPACT = "while read -t 0.3 _; [ $? -gt 128 ]; do echo 1 >/proc/sys/vm/compact_memory; done"
# In the guest: has the kernel try to take a frame from a process that holds it, and says how that went. By VmFlags: "ht" is
# hugetlbfs, "hg" and "nh" are madvise's, and all that holders hold is kept from children ("dc").
MOVE = """
import json, os, subprocess, sys
pid, flag = sys.argv[1:]
begin = end = address = None
for line in open(f"/proc/{pid}/smaps"):
    words = line.split()
    if "-" in words[0] and not words[0].endswith(":"):
        begin, end = (int(part, 16) for part in words[0].split("-"))
    elif words[0] == "VmFlags:" and "dc" in words and flag in words:
        address = begin if flag != "hg" else -(-begin // (2 << 20)) * (2 << 20)
        break
pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
def frame():
    entry = int.from_bytes(os.pread(pagemap, 8, address // 4096 * 8), "little")
    return entry & (1 << 55) - 1 if entry >> 63 else None
before = frame()
def tried(path, text):
    script = f"open({path!r}, 'wb', 0).write({text!r})"
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=4)
    except subprocess.TimeoutExpired:
        return "goes on for ever"
    return "done" if done.returncode == 0 else done.stderr.splitlines()[-1]
soft = tried("/sys/devices/system/memory/soft_offline_page", b"%#x" % (before * 4096))
after = frame()
block = before // 32768
offline = tried(f"/sys/devices/system/memory/memory{block}/state", b"offline")
state = open(f"/sys/devices/system/memory/memory{block}/state").read().strip()
print(json.dumps({"soft": soft, "moved": after != before, "offline": offline, "state": state, "in place": frame() == before}))
"""


@pytest.fixture(scope="module")
def large() -> Iterator[VirtualMachine]:
    """Two nodes, memory above 4 GiB, and half of it in ZONE_MOVABLE."""
    options = [
        "-object memory-backend-ram,id=m0,size=2560M -object memory-backend-ram,id=m1,size=2560M",
        "-numa node,nodeid=0,memdev=m0,cpus=0 -numa node,nodeid=1,memdev=m1",
        *(f"-trace virtio_balloon_{event}_run" for event in ("handle", "bad", "short")),
    ]
    with VirtualMachine(
        LARGE_MIB,
        devices=["virtio-balloon-pci,cont-pages=on,id=balloon1"],
        qemu_options=options,
        append=["movablecore=2560M"],
        cache=True,
    ) as machine:
        yield machine


@contextmanager
def compacting(machine: VirtualMachine) -> Iterator[None]:
    """The guest moves all memory that it can move, all the time."""
    process = machine.start(["bash", "-c", COMPACT], keep_stdin=True)
    yield
    process.close_stdin()
    process.wait(60)


def pools(machine: VirtualMachine) -> list[str]:
    return machine.shell("cat /sys/kernel/mm/hugepages/*/nr_hugepages").split()


def pools_become(machine: VirtualMachine, wanted: list[str]) -> None:
    """As large as they were. The kernel frees what was pinned a moment after the pin was closed."""
    deadline = time.monotonic() + 30
    while (now := pools(machine)) != wanted:
        assert time.monotonic() < deadline, now


def move(machine: VirtualMachine, pid: int, flag: str) -> dict[str, object]:
    """What came of trying to take a frame from process ``pid``."""
    result: dict[str, object] = json.loads(machine.run(["python3", "-c", MOVE, str(pid), flag]).check().out)
    return result


def runs_told(machine: VirtualMachine, direction: str) -> list[tuple[int, int]]:
    """First frame and count of the runs that the device has carried out so far."""
    lines = re.findall(rf"virtio_balloon_handle_run .* {direction} gpa: 0x([0-9a-f]+) size: 0x([0-9a-f]+)", machine.log())
    return [(int(address, 16) // 4096, int(size, 16) // 4096) for address, size in lines]


def test_nodes_movable_memory_and_memory_above_4_gib(large: VirtualMachine) -> None:
    """Exact targets in whole blocks, in huge pages of both kinds and in a tail, and no run that crosses a boundary."""
    held = breathe(large, (1500, 4000, 1811), "--sources", "blocks,hugetlb,thp,pages")["held_bytes"]
    assert held["blocks"]
    assert held["hugetlb"]
    now = breathe(large, (3800, 3301), "--sources", "thp,pages")
    assert set(now["held_bytes"]) == {"thp", "pages"}
    zoneinfo = large.shell("cat /proc/zoneinfo")
    starts = {int(start) for start in re.findall(r"start_pfn:\s+(\d+)", zoneinfo)}
    assert "zone  Movable" in zoneinfo
    assert zoneinfo.count("Node 1, zone") > 1
    inflated = runs_told(large, "inflate")
    assert any(first >= 1 << 20 for first, _ in inflated), "nothing above 4 GiB was taken"
    for first, count in inflated + runs_told(large, "deflate"):
        assert first // 32768 == (first + count - 1) // 32768
        assert not any(first < start < first + count for start in starts)
    nothing_left(large)


@pytest.mark.parametrize(
    ("source", "size", "flag"),
    [("thp", "8M", "hg"), ("hugetlb", "8M", "ht"), ("pages", "1M", "nh"), ("hugetlb-1g", "1G", "ht")],
)
def test_what_is_held_stays_where_it_is(large: VirtualMachine, source: str, size: str, flag: str) -> None:
    before = pools(large)
    with pattern(large), compacting(large), running_agent(large, "--sources", source):
        now = json.loads(large.run(ctl_command("set", size, "--json")).check().out)
        assert now["held_bytes"].keys() == {source}
        # The first holder holds; a worker is another process.
        results = [move(large, pid, flag) for pid in now["holder_pids"][:1]]
        for result in results:
            assert "Device or resource busy" in str(result["soft"]), result
            assert not result["moved"]
            assert result["offline"] != "done"
            assert result["state"] == "online"
            assert result["in place"]
        large.run(ctl_command("set", "0")).check()
    pools_become(large, before)


def test_memory_that_is_only_locked_is_moved(large: VirtualMachine) -> None:
    """Otherwise the test before this one would show nothing."""
    program = (
        "from balloon_agent.memory import taking; from balloon_agent.memory.pagemap import Pagemap; import sys, time;"
        " held = taking.take_{}(Pagemap(), 64, taking.Stopwatch(), pinned=False); print('up', flush=True); sys.stdin.read()"
    )
    for kind, flag in (("thp", "hg"), ("pages", "nh")):
        process = large.start([PYTHON, "-c", program.format(kind)], keep_stdin=True)
        process.wait_for("up", 60)
        assert process.pid is not None
        result = move(large, process.pid, flag)
        assert result["soft"] == "done", result
        assert result["moved"], result
        process.close_stdin()
        process.wait(60).check()


# In the guest, in place of balloon-agent: kills the holder of what was just translated, before the host hears of it, and looks
# at the frames when the host has answered, and when the agent has dealt with the death.
KILL_IN_FLIGHT = """
import os, signal, sys, time
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.pagemap import Pagemap
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
    return sum(1 for run in runs if pagemap.flags(run.first) & (BUDDY | NOPAGE) or not pagemap.is_huge(run.first))
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
    deadline = time.monotonic() + 20
    while free(died) < len(died) and time.monotonic() < deadline:
        time.sleep(0.01)
    print("free in the end:", free(died), "of", len(died), flush=True)
    return result
BalloonDevice.inflate, Balloon.holder_lost, Holders.start = killing, dealing, start
from balloon_agent.cli.agent import main
sys.exit(main(["run", "--sources", "thp"]))
"""


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
    machine.set_balloon(520)
    agent = machine.start(agent_command("run", "--verbose", *options))
    agent.wait_for("is to have 504 MiB", 120)
    # Its steps are seen in the host's view of the balloon.
    deadline = time.monotonic() + 60
    while machine.balloon_actual() >> 20 in (MEMORY_MIB, 520):
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
            machine.wait_balloon(520, 120)
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
