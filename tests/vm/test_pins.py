"""What is held stays where it is, whatever the kernel tries; and what is only locked does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BIN, ctl_command, running_agent
from tests.vm.conftest import Stage
from tests.vm.tools import pattern, pools_become, status

PYTHON = str(BIN / "python")
COMPACT = "while read -t 0.3 _; [ $? -gt 128 ]; do echo 1 >/proc/sys/vm/compact_memory; done"
# In the guest: has the kernel try to take a frame from a process that holds it, and says how that went. By VmFlags: "ht" is
# hugetlbfs, "nh" is what madvise keeps free of huge pages, and all that holders hold is kept from children ("dc").
MOVE = """
import json, os, subprocess, sys
pid, flag = sys.argv[1:]
begin = end = address = None
for line in open(f"/proc/{pid}/smaps"):
    words = line.split()
    if "-" in words[0] and not words[0].endswith(":"):
        begin, end = (int(part, 16) for part in words[0].split("-"))
    elif words[0] == "AnonHugePages:":
        huge = int(words[1]) > 0
    elif words[0] == "VmFlags:" and "dc" in words and (huge if flag == "thp" else flag in words):
        address = begin if flag != "thp" else -(-begin // (2 << 20)) * (2 << 20)
        break
if address is None:
    print("{}")
    sys.exit()
pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
def frame():
    entry = int.from_bytes(os.pread(pagemap, 8, address // 4096 * 8), "little")
    return entry & (1 << 55) - 1 if entry >> 63 else None
before = frame()
def tried(path, text, seconds):
    script = f"open({path!r}, 'wb', 0).write({text!r})"
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "goes on for ever"
    return "done" if done.returncode == 0 else done.stderr.splitlines()[-1]
soft = tried("/sys/devices/system/memory/soft_offline_page", b"%#x" % (before * 4096), 60)
after = frame()
block = before // 32768
offline = tried(f"/sys/devices/system/memory/memory{block}/state", b"offline", 4)
state = open(f"/sys/devices/system/memory/memory{block}/state").read().strip()
print(json.dumps({"soft": soft, "moved": after != before, "offline": offline, "state": state, "in place": frame() == before}))
"""


@pytest.fixture
def plain(stage: Stage) -> VirtualMachine:
    """A guest of which 1 GiB lies together in two places: they are reserved while it boots, to be let go."""
    return stage.machine(
        "plain",
        lambda: VirtualMachine(
            6144,
            devices=["virtio-balloon-pci,cont-pages=on,id=balloon1"],
            append=["hugepagesz=1G", "hugepages=2"],
            cache=True,
        ),
    )


@contextmanager
def compacting(machine: VirtualMachine) -> Iterator[None]:
    """The guest moves all memory that it can move, all the time."""
    process = machine.start(["bash", "-c", COMPACT], keep_stdin=True)
    yield
    process.close_stdin()
    process.wait(60)


def move(machine: VirtualMachine, pid: int, flag: str) -> dict[str, object]:
    """What came of trying to take a frame from process ``pid``."""
    result: dict[str, object] = json.loads(machine.run(["python3", "-c", MOVE, str(pid), flag]).check().out)
    return result


# What VmFlags, or AnonHugePages, tell of each source's mappings.
FLAGS = {"thp": "thp", "hugetlb": "ht", "hugetlb-1g": "ht", "pages": "nh"}
GIGANTIC = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"


@pytest.mark.parametrize(("sources", "mib"), [("hugetlb-1g,thp,pages", 1033), ("hugetlb", 8)])
def test_what_is_held_stays_where_it_is(plain: VirtualMachine, sources: str, mib: int) -> None:
    with pattern(plain), compacting(plain), running_agent(plain, "--sources", sources):
        # What lay together while it booted lies together still, but only until the kernel needs a page of it for itself. So
        # it is the host that asks: no program has to be started in the guest for that.
        plain.shell(f"echo 0 >{GIGANTIC}")
        plain.set_balloon(plain.memory_mib - mib)
        plain.wait_balloon(plain.memory_mib - mib, 60)
        now = status(plain)
        assert [*now["held_bytes"]] == sources.split(",")
        for source in now["held_bytes"]:
            tried = [move(plain, pid, FLAGS[source]) for pid in now["holder_pids"]]
            results = [result for result in tried if result]
            assert results
            for result in results:
                # For a page of 1 GiB the kernel looks for another one first, and there is none.
                answer = "Cannot allocate memory" if source == "hugetlb-1g" else "Device or resource busy"
                assert answer in str(result["soft"]), result
                assert not result["moved"]
                assert result["offline"] != "done"
                assert result["state"] == "online"
                assert result["in place"]
        plain.run(ctl_command("deflate")).check()
        plain.set_balloon(plain.memory_mib)
    pools_become(plain, ["0", "0"])


def test_memory_that_is_only_locked_is_moved(plain: VirtualMachine) -> None:
    """Otherwise the test before this one would show nothing."""
    program = (
        "from balloon_agent.holder import allocate; from balloon_agent.linux.pagemap import Pagemap; import sys, time;"
        " held = allocate.take_{}(Pagemap(), 64, allocate.Stopwatch(), pinned=False); print('up', flush=True); sys.stdin.read()"
    )
    for kind, flag in (("thp", "thp"), ("pages", "nh")):
        process = plain.start([PYTHON, "-c", program.format(kind)], keep_stdin=True)
        process.wait_for("up", 60)
        assert process.pid is not None
        result = move(plain, process.pid, flag)
        assert result["soft"] == "done", result
        assert result["moved"], result
        process.close_stdin()
        process.wait(60).check()
