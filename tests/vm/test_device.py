"""The QEMU patch, driven by hand: entries that no driver of ours would send, and devices without the feature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, agent_command
from tests.vm.conftest import Stage, address_of_balloon, driver_of_balloon, kernel_driver_works
from tests.vm.tools import free_huge_pages, huge_pages, plug, unplug

# Runs in the guest: a driver that posts raw bytes, one buffer each, and says whether each came back.
RAW_DRIVER = """
import struct
from balloon_agent.access.binding import take
from balloon_agent.access.pci import find_balloon, functions
from balloon_agent.access.uio import UioTransport
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.virtio.queue import Buffer

binding = take(find_balloon(None, functions()))
transport = UioTransport(binding.function)
device = BalloonDevice(transport, "cont")
device.start()

def entry(frame, size):
    return struct.pack("<II", frame, size)

inflate, deflate, page = device._channel._inflate_queue, device._channel._deflate_queue, device._channel._page

def post(name, data, queue=inflate):
    page.view[: len(data)] = data
    head = queue.add([Buffer(page.address, len(data))])
    device.virtio.notify(queue)
    print(name, "done" if queue.completed() == [head] else "LOST", flush=True)
"""
RAW_END = """
device.stop()
transport.close()
binding.restore()
"""
BAD_ENTRIES = """
from balloon_agent.holder import allocate
from balloon_agent.linux.pagemap import Pagemap

held = allocate.take_pages(Pagemap(), 1, allocate.Stopwatch())
piece = next(iter(held.pieces))
frame = piece.first
view = allocate.libc.view(piece.address, 4096)
view[:5] = b"there"
ram_end, hole = (1 << 30) >> 12, 0xC0000000 >> 12
post("zero", entry(frame, 0))
post("odd", entry(frame, 100))
post("short", entry(frame, 0)[:4])
post("hole", entry(hole, 4096))
post("beyond", entry(0xFFFFFFFF, 0xFFFFF000))
post("rom", entry(0xFFFC0000 >> 12, 0x40000))
post("behind", entry(ram_end, 1 << 20))
# Over the end of RAM, and over the hole below 1 MiB: on the queue that discards nothing, for the guest is using that memory.
post("over", entry(ram_end - 1, 1 << 20), deflate)
post("low", entry(0, 1 << 20), deflate)
print("kept" if bytes(view[:5]) == b"there" else "DISCARDED")
# Bad entries around a good one: it is served, they are skipped.
post("mixed", entry(frame, 0) + entry(frame, 4096) + entry(frame, 5000) + b"tail")
print("discarded" if bytes(view[:5]) == bytes(5) else "KEPT", flush=True)
view.release()
device.virtio.reset()
allocate.let_go(held)
"""
# QEMU's plug-in memory lies from 4 GiB on. Nobody in the guest uses it: Debian leaves such blocks offline.
HUGE_BACKED = """
import sys
FIRST, FRAMES, HUGE = (4 << 30) >> 12, 512, 2 << 20
print("up", flush=True)
for line in sys.stdin:
    match line.split():
        case ["whole", n]:
            post("whole", entry(FIRST + int(n) * FRAMES, HUGE))
        case ["several", n]:
            post("several", entry(FIRST + int(n) * FRAMES, 2 * HUGE))
        case ["half", n]:
            post("half", entry(FIRST + int(n) * FRAMES, HUGE // 2))
        case ["halves", n]:
            middle = FIRST + int(n) * FRAMES + FRAMES // 2
            post("halves", entry(FIRST + int(n) * FRAMES, HUGE // 2) + entry(middle, HUGE // 2))
        case ["straddle", n]:
            post("straddle", entry(FIRST + int(n) * FRAMES + FRAMES // 2, 2 * HUGE))
        case ["over", n]:
            post("over", entry(FIRST + int(n) * FRAMES, 64 * HUGE))
"""


def raw(program: str) -> list[str]:
    python = agent_command()[0].replace("balloon-agent", "python")
    return [python, "-c", RAW_DRIVER + program + RAW_END]


def test_bad_entries_are_skipped_with_a_trace_and_break_nothing(machine: VirtualMachine) -> None:
    output = machine.run(raw(BAD_ENTRIES)).check().out.splitlines()
    names = ("zero", "odd", "short", "hole", "beyond", "rom", "behind", "over", "low")
    assert output == [*(f"{name} done" for name in names), "kept", "mixed done", "discarded"]
    traced = machine.log()
    # Clamped to the section that was found, and what lies behind it looked up again: no byte dropped, none out of bounds.
    assert "deflate gpa: 0x3ffff000 size: 0x1000" in traced, traced[-3000:]
    assert "skipped gpa: 0x40000000 size: 0xff000" in traced
    low = [line for line in traced.splitlines() if "virtio_balloon_handle_run" in line and "deflate gpa: 0x0 " in line]
    assert low
    first = int(low[0].rsplit("size: ", 1)[1], 16)
    assert first < 1 << 20
    assert f"gpa: {first:#x} " in traced
    assert "4 bytes after the last whole entry" in traced
    kernel_driver_works(machine)


def test_memory_on_huge_pages_of_the_host_goes_back_by_whole_pages(stage: Stage) -> None:
    """Eight huge pages of the host, plugged into a machine of their own and given back run by run."""
    pages = 8
    stage.clear()
    with huge_pages(pages), plugged_machine(pages) as machine:
        assert free_huge_pages() == 0
        driver = machine.start(raw(HUGE_BACKED), keep_stdin=True)
        driver.wait_for("up", 120)
        for command, free in (
            ("whole 0", 1),
            ("half 1", 1),  # half a page is kept back
            ("halves 1", 2),  # both halves in one buffer make a whole one
            ("several 2", 4),
            ("straddle 4", 5),  # half of 4, all of 5, half of 6
            ("over 7", 6),  # from the last page far over the end: that page, and nothing else
        ):
            driver.write(f"{command}\n")
            name = command.split()[0]
            driver.wait_for(f"{name} done", 60)
            assert free_huge_pages() == free, command
        driver.close_stdin()
        driver.wait(60).check()


@contextmanager
def plugged_machine(pages: int) -> Iterator[VirtualMachine]:
    """A machine with ``pages`` huge pages of the host's as plugged-in memory from 4 GiB on."""
    size = pages * 2
    options = [
        "-m slots=1,maxmem=8G",
        f"-object memory-backend-memfd,id=huge,size={size}M,hugetlb=on,hugetlbsize=2M,prealloc=on",
    ]
    with VirtualMachine(devices=[BALLOON_DEVICE, "pc-dimm,memdev=huge,addr=0x100000000"], qemu_options=options) as machine:
        yield machine


@pytest.fixture
def without_balloon(machine: VirtualMachine) -> Iterator[VirtualMachine]:
    """The balloon unplugged; the device with the feature is back afterwards."""
    unplug(machine)
    yield machine
    if address_of_balloon(machine):
        unplug(machine)
    plug(machine, cont_pages=True)


def test_a_machine_without_a_balloon_is_told_how_to_get_one(without_balloon: VirtualMachine) -> None:
    result = without_balloon.run(agent_command("run"))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "no virtio balloon on the PCI bus" in result.err


def test_a_balloon_without_the_wanted_channel_is_refused_and_given_back(without_balloon: VirtualMachine) -> None:
    plug(without_balloon)
    result = without_balloon.run(agent_command("run", "--channel", "cont"))
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "does not offer CONT_PAGES (feature bit 6" in errors[0]
    assert driver_of_balloon(without_balloon) == "virtio-pci"
    kernel_driver_works(without_balloon)
