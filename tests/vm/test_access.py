"""The ways to the device: vfio behind a virtual IOMMU, uio, a locked-down kernel; by hand; what fails leaves no trace."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from contrib.vm import Process, VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, STEP_DEADLINE, agent_command, ctl_command
from tests.vm.conftest import (
    MEMORY_MIB,
    PORT,
    Stage,
    address_of_balloon,
    driver_of_balloon,
    kernel_driver_works,
    nothing_left,
)
from tests.vm.tools import breathe, pattern, plug, status, unplug

VFIO, UIO = "vfio-pci", "uio_pci_generic"
SIZES = (600, 900, 700)


def behind_an_iommu() -> VirtualMachine:
    """With an IOMMU, and a kernel that lets userspace have no registers but through that."""
    return VirtualMachine(
        MEMORY_MIB,
        devices=["intel-iommu", PORT, f"{BALLOON_DEVICE},bus=port1"],
        append=["intel_iommu=on"],
        cache=True,
    )


@pytest.fixture
def guest(stage: Stage) -> VirtualMachine:
    return stage.machine("iommu", behind_an_iommu)


def refused(machine: VirtualMachine, *words: str) -> str:
    """The error, in one line, of a command that must fail; the device is where it was."""
    before = driver_of_balloon(machine)
    output = machine.run(agent_command(*words))
    assert output.code == 1, output.out
    errors = [line for line in output.err.splitlines() if "error:" in line]
    assert len(errors) == 1, output.err
    assert driver_of_balloon(machine) == before
    assert machine.shell("cat /sys/bus/pci/devices/*/driver_override | sort -u").strip() == "(null)"
    return errors[0]


def test_vfio_is_what_is_used_where_an_iommu_is(guest: VirtualMachine) -> None:
    now = breathe(guest, SIZES)
    assert now["driver"] == VFIO
    assert now["channel"] == "cont"
    kernel_driver_works(guest)
    nothing_left(guest)


def test_uio_does_behind_an_iommu_what_it_does_without(guest: VirtualMachine) -> None:
    assert breathe(guest, SIZES, "--driver", UIO)["driver"] == UIO
    kernel_driver_works(guest)
    nothing_left(guest)


def test_an_agent_that_was_killed_leaves_vfio_to_the_next(guest: VirtualMachine) -> None:
    with pattern(guest):
        first = driving(guest)
        guest.set_balloon(600)
        guest.wait_balloon(600, STEP_DEADLINE)
        first.signal(signal.SIGKILL)
        first.wait(STEP_DEADLINE)
        assert driver_of_balloon(guest) == VFIO
        second = driving(guest)
        assert "an earlier agent left 424 MiB in the balloon" in second.err
        guest.set_balloon(900)
        guest.wait_balloon(900, STEP_DEADLINE)
        end(second)
    kernel_driver_works(guest)
    nothing_left(guest)


@pytest.mark.parametrize("sources", ["blocks,pages", pytest.param("pages", marks=pytest.mark.long)])
def test_a_balloon_that_goes_while_it_is_filled_by_vfio_and_comes_again(guest: VirtualMachine, sources: str) -> None:
    # While it is unplugged the kernel has a lock that blocks need, too.
    goes_and_comes_again(guest, VFIO, sources)


def test_a_device_that_takes_part_in_the_iommu(guest: VirtualMachine) -> None:
    """Its rings are addressed through it; the numbers in them are guest-physical as ever."""
    unplug(guest)
    plug(guest, cont_pages=True, iommu_platform=True, free_page_reporting=True)
    assert breathe(guest, SIZES)["driver"] == VFIO
    # A report names memory that the device must reach itself.
    assert "--channel reporting is not possible behind an IOMMU" in refused(guest, "run", "--channel", "reporting")
    assert "use --driver vfio-pci, or boot the guest with iommu=pt" in refused(guest, "run", "--driver", UIO)
    nothing_left(guest)
    unplug(guest)
    plug(guest, cont_pages=True)


def test_a_group_with_another_device_in_use_is_left_to_its_drivers(guest: VirtualMachine) -> None:
    """Two functions of one device: an IOMMU cannot tell them apart."""
    unplug(guest)
    guest.qmp("device_add", driver="virtio-rng-pci", id="neighbour", bus="port1", addr="0.1", multifunction=True)
    # With the first of its functions the others come, too.
    plug(guest, cont_pages=True, multifunction=True)
    address = address_of_balloon(guest)
    neighbour = address.replace(".0", ".1")
    guest.shell(f"until test -e /sys/bus/pci/devices/{neighbour}/driver; do sleep 0.1; done")
    error = refused(guest, "bind", "--driver", VFIO)
    assert f"has others in use: {neighbour} (virtio-pci); give the balloon a group of its own" in error
    kernel_driver_works(guest)
    assert f"{address} is with {UIO} now" in guest.run(agent_command("bind")).check().out
    guest.run(agent_command("unbind")).check()
    kernel_driver_works(guest)
    unplug(guest)
    plug(guest, cont_pages=True)


def test_a_kernel_that_is_locked_down_lets_only_vfio_have_the_device(guest: VirtualMachine) -> None:
    """The last on this machine: there is no way back from it."""
    guest.shell("mountpoint -q /sys/kernel/security || mount -t securityfs none /sys/kernel/security")
    guest.shell("echo integrity >/sys/kernel/security/lockdown")
    assert "locked down (integrity): it lets only vfio have registers" in refused(guest, "run", "--driver", UIO)
    assert breathe(guest, SIZES)["driver"] == VFIO
    kernel_driver_works(guest)
    nothing_left(guest)


# -- without an IOMMU, on the machine that most tests share ---------------------------------------------------------------


def test_uio_with_a_device_that_would_take_part_in_an_iommu(machine: VirtualMachine) -> None:
    unplug(machine)
    plug(machine, cont_pages=True, iommu_platform=True)
    assert breathe(machine, SIZES)["driver"] == UIO
    unplug(machine)
    plug(machine, cont_pages=True)
    kernel_driver_works(machine)


def test_a_balloon_that_goes_while_it_is_filled_and_comes_again(machine: VirtualMachine) -> None:
    goes_and_comes_again(machine, UIO, "pages")


def test_what_cannot_be_bound_stays_where_it_is(machine: VirtualMachine) -> None:
    address = address_of_balloon(machine)
    assert "there is no IOMMU" in refused(machine, "bind", "--driver", VFIO)
    assert f"there is no PCI function 0000:00:1e.7 (virtio balloons here: {address} (virtio-pci))" in refused(
        machine, "bind", "--device", "00:1e.7"
    )
    # A module that is not to be had.
    machine.shell("! test -d /sys/module/uio_pci_generic || rmmod uio_pci_generic")
    machine.shell("echo 'install uio_pci_generic /bin/false' >/etc/modprobe.d/not.conf")
    try:
        assert "the kernel has no driver uio_pci_generic" in refused(machine, "bind")
        assert "the kernel has no driver uio_pci_generic" in refused(machine, "run")
    finally:
        machine.shell("rm /etc/modprobe.d/not.conf")
    kernel_driver_works(machine)


def test_binding_by_hand(machine: VirtualMachine) -> None:
    address = address_of_balloon(machine)
    machine.set_balloon(900)
    machine.wait_balloon(900, STEP_DEADLINE)
    # The kernel's driver gives back its pages first.
    assert f"{address} is with {UIO} now, and was with virtio-pci" in machine.run(agent_command("bind")).check().out
    assert driver_of_balloon(machine) == UIO
    machine.wait_balloon(MEMORY_MIB, STEP_DEADLINE)
    machine.set_balloon(MEMORY_MIB)
    (listed,) = devices(machine)
    assert (listed["address"], listed["driver"], listed["agent_pid"]) == (address, UIO, None)
    assert listed["obstacles"][UIO] is None
    agent = driving(machine)
    assert devices(machine)[0]["agent_pid"] == agent.pid
    busy = machine.run(agent_command("unbind"))
    assert busy.code == 1
    assert f"{address} is used by another agent already, process {agent.pid}" in busy.err
    # It was found here, and is left here.
    end(agent)
    assert driver_of_balloon(machine) == UIO
    assert f"{address} is with virtio-pci now" in machine.run(agent_command("unbind")).check().out
    kernel_driver_works(machine)


def devices(machine: VirtualMachine) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(machine.run(agent_command("devices", "--json")).check().out)
    return answer


def driving(machine: VirtualMachine, *options: str) -> Process:
    agent = machine.start(agent_command("run", *options))
    agent.wait_for("driving", STEP_DEADLINE)
    return agent


def end(agent: Process) -> None:
    agent.signal(signal.SIGTERM)
    agent.wait(STEP_DEADLINE).check()


def goes_and_comes_again(machine: VirtualMachine, driver: str, sources: str) -> None:
    """Unplugged in the middle of inflating: the memory is the guest's again, and the next device is taken in turn."""
    total = machine.shell("grep MemTotal /proc/meminfo")
    with pattern(machine):
        agent = driving(machine, "--sources", sources)
        machine.set_balloon(600)
        agent.wait_for("is to have 424 MiB", STEP_DEADLINE)
        unplug(machine)
        agent.wait_for("what the balloon held is the guest's again", STEP_DEADLINE)
        agent.wait_for("there is no balloon device", STEP_DEADLINE)
        now = status(machine)
        assert (now["state"], now["actual_bytes"], now["device"]) == ("absent", 0, "")
        if sources == "pages":
            # Frame by frame it takes a while; whole blocks go at once.
            assert 0 < now["inflated_bytes_total"] < 424 << 20
        assert "no virtio balloon on the PCI bus" in now["shortfall"]
        assert machine.shell("grep MemTotal /proc/meminfo") == total
        # By hand it can be set, and is told why that is not done.
        assert machine.run(ctl_command("set", "100M"), timeout=STEP_DEADLINE).code == 3
        machine.run(ctl_command("follow")).check()
        plug(machine, cont_pages=True)
        agent.wait_for("another balloon device is there", STEP_DEADLINE)
        for size in (600, 800):
            machine.set_balloon(size)
            machine.wait_balloon(size, STEP_DEADLINE)
        now = status(machine)
        assert (now["device"], now["driver"]) == (address_of_balloon(machine), driver)
        assert now["actual_bytes"] == (MEMORY_MIB - 800) << 20
        end(agent)
    kernel_driver_works(machine)
    nothing_left(machine)
