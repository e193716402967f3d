"""What the tests of this folder share: a process that would notice corruption, and handles on guest, host and device."""

from __future__ import annotations

import ctypes
import json
import mmap
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrib.vm import Process, VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, ctl_command, running_agent
from contrib.vm.machine import guard
from contrib.vm.smaps import mapping_at
from contrib.vm.workload import guestmem
from tests.vm.conftest import address_of_balloon

PATTERN_MIB = 100
METRICS = "http://127.0.0.1:9758/metrics"


@contextmanager
def pattern(machine: VirtualMachine, program: str | None = None) -> Iterator[Process]:
    """A process that fills memory and checks it all the time; it fails the test if a single word was wrong at any time.

    ``program`` is where the guest has it, if that is not where this machine has it.
    """
    process = machine.start([program or str(guestmem()), "verify", str(PATTERN_MIB), "--huge"], keep_stdin=True)
    process.wait_for("ready", 120)
    try:
        yield process
    except BaseException:
        # The tests after this one share the machine.
        process.signal(signal.SIGKILL)
        raise
    process.close_stdin()
    output = process.wait(120)
    assert output.code == 0, output.out
    assert "corrupt 0" in output.out
    rounds = int(output.out.split("rounds ")[1].split()[0])
    assert rounds >= 2, "the pattern was hardly looked at"


def status(machine: VirtualMachine) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(machine.run(ctl_command("status", "--json")).check().out)
    return answer


def scrape(machine: VirtualMachine) -> dict[str, float]:
    program = f"import urllib.request as u; print(u.urlopen('{METRICS}', timeout=60).read().decode())"
    text = machine.run(["python3", "-I", "-S", "-c", program]).check().out
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


NR_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def free_huge_pages() -> int:
    return int(NR_HUGEPAGES.with_name("free_hugepages").read_text())


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """A pool of so many huge pages on this machine, given back at the end."""
    before = int(NR_HUGEPAGES.read_text())
    assert free_huge_pages() == 0, "somebody else's huge pages would be counted"
    call_off = guard(f"echo {before} >{NR_HUGEPAGES}")
    NR_HUGEPAGES.write_text(f"{before + count}\n")
    try:
        assert int(NR_HUGEPAGES.read_text()) == before + count, "this machine has no huge pages to spare"
        yield
    finally:
        NR_HUGEPAGES.write_text(f"{before}\n")
        call_off()


HUGE, SMALL = 2 << 20, 4 << 10


def comes_back_huge(piece: int) -> bool:
    """A huge page of this host that is discarded in pieces of ``piece`` bytes, as QEMU does, is huge again when touched.

    Linux takes a page table away only with all of the 2 MiB that it maps: where small pages were discarded one by one, small
    pages are faulted in, until khugepaged comes by.
    """
    with mmap.mmap(-1, 2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        first = -address % HUGE
        memory.madvise(mmap.MADV_HUGEPAGE)

        def touched_kib() -> int:
            for offset in range(first, first + HUGE, SMALL):
                memory[offset] = 1
            return mapping_at(Path("/proc/self/smaps").read_text(), address).anon_huge_kib

        assert touched_kib() == HUGE >> 10, "this host has no huge page to spare"
        for offset in range(first, first + HUGE, piece):
            memory.madvise(mmap.MADV_DONTNEED, offset, piece)
        return touched_kib() == HUGE >> 10


def unplug(machine: VirtualMachine) -> None:
    machine.qmp("device_del", id="balloon1")
    deadline = time.monotonic() + 60
    while address_of_balloon(machine) or any(
        "balloon1" in child["name"] for child in machine.qmp("qom-list", path="/machine/peripheral")
    ):
        assert time.monotonic() < deadline, "the balloon does not go"


def plug(machine: VirtualMachine, **properties: bool) -> None:
    """A balloon with these properties (``cont_pages=True``) behind the port."""
    driver, *_ = BALLOON_DEVICE.split(",")
    machine.qmp(
        "device_add",
        driver=driver,
        id="balloon1",
        bus="port1",
        # One of them is older than the convention.
        **{name if name == "iommu_platform" else name.replace("_", "-"): value for name, value in properties.items()},
    )
    deadline = time.monotonic() + 60
    while not address_of_balloon(machine):
        assert time.monotonic() < deadline, "the balloon does not come"
    machine.shell("udevadm settle")


def breathe(
    machine: VirtualMachine, sizes: Sequence[int], *options: str, look: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The agent takes the balloon to each size in turn, exactly, beside the pattern process. Returns its last status.

    ``look`` is called each time that a size is reached.
    """
    with pattern(machine), running_agent(machine, *options):
        for guest in sizes:
            machine.set_balloon(guest)
            machine.wait_balloon(guest, 120)
            look()
        now = status(machine)
        assert sum(now["held_bytes"].values()) == (machine.memory_mib - sizes[-1]) << 20
        assert not any(now["device_faults_total"].values()), now
        machine.set_balloon(machine.memory_mib)
        machine.wait_balloon(machine.memory_mib, 120)
    return now


def pools(machine: VirtualMachine) -> list[str]:
    return machine.shell("cat /sys/kernel/mm/hugepages/*/nr_hugepages").split()


def pools_become(machine: VirtualMachine, wanted: list[str]) -> None:
    """As large as they were. The kernel frees what was pinned a moment after the pin was closed."""
    deadline = time.monotonic() + 60
    while (now := pools(machine)) != wanted:
        assert time.monotonic() < deadline, now
