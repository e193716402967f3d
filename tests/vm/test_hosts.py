"""The agent on every kind of host: what each of them can hear, exact sizes up and down, and memory intact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from contrib.vm import VirtualMachine, experiment
from contrib.vm.cache import debian_qemu
from contrib.vm.experiment import agent_command
from contrib.vm.workload import guestmem
from tests.vm.conftest import MEMORY_MIB, PORT, Stage, address_of_balloon, driver_of_balloon, kernel_driver_works, nothing_left
from tests.vm.tools import breathe, free_huge_pages, huge_pages, plug, unplug

# A block or several and a tail, all of it back, and a size in which every source has a part.
SIZES = (600, MEMORY_MIB, 553)
EVERYTHING = "virtio-balloon-pci,id=balloon1,cont-pages=on,free-page-hint=on,iothread=io1,free-page-reporting=on"
REPORTING = "virtio-balloon-pci,id=balloon1,free-page-reporting=on"
HUGE_MIB = 2


@pytest.fixture
def everything(stage: Stage) -> VirtualMachine:
    """Our QEMU with every queue that there is."""
    options = ["-object iothread,id=io1"]
    return stage.machine(
        "everything", lambda: VirtualMachine(MEMORY_MIB, devices=[EVERYTHING], qemu_options=options, cache=True)
    )


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        ("auto", "cont"),
        pytest.param("reporting", "reporting", marks=pytest.mark.long),
        pytest.param("classic", "classic", marks=pytest.mark.long),
    ],
)
def test_a_host_that_offers_everything(everything: VirtualMachine, channel: str, expected: str) -> None:
    now = breathe(everything, SIZES, "--channel", channel)
    assert now["channel"] == expected
    nothing_left(everything)
    kernel_driver_works(everything)


@pytest.fixture
def unpatched(stage: Stage) -> VirtualMachine:
    """Debian's own QEMU, with free page reporting."""
    devices = [PORT, f"{REPORTING},bus=port1"]
    return stage.machine("unpatched", lambda: VirtualMachine(MEMORY_MIB, devices=devices, qemu=debian_qemu(), cache=True))


def test_an_unpatched_host_with_reporting(unpatched: VirtualMachine) -> None:
    assert breathe(unpatched, SIZES)["channel"] == "reporting"
    nothing_left(unpatched)
    kernel_driver_works(unpatched)


def test_an_unpatched_host_with_the_classic_queues_only(unpatched: VirtualMachine) -> None:
    unplug(unpatched)
    plug(unpatched)
    refused = unpatched.run(agent_command("run", "--channel", "reporting"))
    assert refused.code == 1
    errors = [line for line in refused.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "does not offer REPORTING (feature bit 5" in errors[0]
    assert driver_of_balloon(unpatched) == "virtio-pci"
    assert breathe(unpatched, SIZES)["channel"] == "classic"
    nothing_left(unpatched)
    kernel_driver_works(unpatched)


@pytest.fixture
def on_huge_pages(stage: Stage) -> VirtualMachine:
    """A guest all of whose RAM lies in the host's huge pages."""
    return stage.machine("on huge pages", machine_on_huge_pages)


@contextmanager
def machine_on_huge_pages() -> Iterator[VirtualMachine]:
    options = [
        f"-object memory-backend-memfd,id=ram,size={MEMORY_MIB}M,hugetlb=on,hugetlbsize=2M,prealloc=on",
        "-machine memory-backend=ram",
        "-object iothread,id=io1",
    ]
    with (
        huge_pages(MEMORY_MIB // HUGE_MIB),
        VirtualMachine(MEMORY_MIB, devices=[EVERYTHING], qemu_options=options, cache=True) as machine,
    ):
        # The guest's own driver would report free pages to the host by itself, and nobody could tell whose doing it was.
        machine.shell(f"echo {address_of_balloon(machine)} > /sys/bus/pci/drivers/virtio-pci/unbind")
        yield machine


@pytest.mark.parametrize(
    "options",
    [
        ("--channel", "cont"),
        pytest.param(("--channel", "reporting"), marks=pytest.mark.long),
        pytest.param(("--channel", "classic", "--frames-per-buffer", "512"), marks=pytest.mark.long),
    ],
    ids=["cont", "reporting", "classic"],
)
def test_huge_pages_of_the_host_go_back_whole(on_huge_pages: VirtualMachine, options: tuple[str, ...]) -> None:
    machine = on_huge_pages
    touch_free_memory(machine)
    before = free_huge_pages()
    seen: list[int] = []
    breathe(machine, (600, 700, 554), *options, look=lambda: seen.append(free_huge_pages()))
    inflated = (MEMORY_MIB - 600) // HUGE_MIB
    # What the guest had not touched again since an earlier test may be in the balloon now.
    assert before < inflated // 4, (before, seen)
    assert inflated <= seen[0] <= inflated + before, (before, seen)
    # Given back, the guest has the host's pages only once it touches them.
    assert seen[2] >= (MEMORY_MIB - 554) // HUGE_MIB, (before, seen)
    nothing_left(machine)


def touch_free_memory(machine: VirtualMachine) -> None:
    """Have the guest use what it has, so that the host must back it."""
    free_kib = int(machine.shell("grep MemFree /proc/meminfo").split()[1])
    user = machine.start([str(guestmem()), "touch", str((free_kib >> 10) - 60), "--huge"], keep_stdin=True)
    user.wait_for("ready", 120)
    user.close_stdin()
    user.wait(60).check()


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.parametrize("memory", experiment.PUNCHED)
def test_the_experiment_on_an_unpatched_host(memory: str) -> None:
    lines: list[str] = []
    result = experiment.run("agent", lines.append, memory, qemu=debian_qemu(), device=REPORTING)
    assert result.actual_mib == {"600": 600.0, "1024": 1024.0}
    assert result.lost_thp_kib <= 16 << 10, (result, lines)
    assert result.host_free_gained_kib >= 280 << 10, result
    assert result.anon_huge_kib["reused"] >= result.anon_huge_kib["touched"], result
