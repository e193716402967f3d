"""The machines of the tests of this folder. Most share one; others have one that is booted for them, one after the other.

``-m own`` are those with a machine of their own, ``-m system`` those on one that systemd runs, ``-m alone`` those that read off
how much memory the host has left: nothing else should run meanwhile. See tests/run. None reads off how long something takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE

HERE = Path(__file__).parent
MEMORY_MIB = 1024
PORT = "pcie-root-port,id=port1,chassis=1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "machine" not in getattr(item, "fixturenames", ()):
            item.add_marker("system" if "fresh" in getattr(item, "fixturenames", ()) else "own")


@pytest.fixture(scope="session")
def machine() -> Iterator[VirtualMachine]:
    """Booted once, with the balloon behind a port that it can be unplugged from."""
    device = f"{BALLOON_DEVICE},bus=port1"
    # The trace of entries that the device skipped goes to the machine's messages.
    options = [f"-trace virtio_balloon_{event}_run" for event in ("handle", "bad", "short")]
    with VirtualMachine(memory_mib=MEMORY_MIB, devices=[PORT, device], qemu_options=options, cache=True) as machine:
        yield machine


def address_of_balloon(machine: VirtualMachine) -> str:
    """Where the guest sees it, or an empty string."""
    script = (
        "for f in /sys/bus/pci/devices/*; do case $(cat $f/vendor)$(cat $f/device) in"
        " 0x1af40x1045|0x1af40x1002) basename $f;; esac; done"
    )
    return machine.shell(script).strip()


def driver_of_balloon(machine: VirtualMachine) -> str:
    """The driver that it is bound to, by name."""
    return machine.shell(f"basename $(readlink /sys/bus/pci/devices/{address_of_balloon(machine)}/driver)").strip()


def kernel_driver_works(machine: VirtualMachine) -> None:
    """The guest's own driver has the device, and obeys the host."""
    assert driver_of_balloon(machine) == "virtio-pci"
    machine.set_balloon(machine.memory_mib - 16)
    machine.wait_balloon(machine.memory_mib - 16, 60)
    machine.set_balloon(machine.memory_mib)
    machine.wait_balloon(machine.memory_mib, 60)


class Stage:
    """One machine at a time beside the shared one: it stays until another one is asked for."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._context: AbstractContextManager[VirtualMachine] | None = None
        self._machine: VirtualMachine | None = None

    def machine(self, name: str, make: Callable[[], AbstractContextManager[VirtualMachine]]) -> VirtualMachine:
        if self._machine is None or name != self._name:
            self.clear()
            context = make()
            self._machine = context.__enter__()
            self._name, self._context = name, context
        return self._machine

    def clear(self) -> None:
        context, self._context, self._machine = self._context, None, None
        if context is not None:
            context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.clear()


@pytest.fixture(autouse=True)
def left_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test on the shared machine ends with an empty balloon in the kernel's hands, and with no process or file of ours."""
    shared = request.getfixturevalue("machine") if "machine" in request.fixturenames else None
    yield
    if shared is not None:
        nothing_left(shared)


def nothing_left(machine: VirtualMachine) -> None:
    """No process or file of ours, no memory of the guest's missing."""
    machine.set_balloon(machine.memory_mib)
    deadline = time.monotonic() + 60
    while machine.shell("pgrep -f balloon_agent.memory.holde[r] || true").strip():
        assert time.monotonic() < deadline, "a holder is left behind"
    assert machine.shell("cat /run/balloon-agent/state.json 2>/dev/null || true") == ""
    assert machine.shell("ls /run/balloon-agent/holders 2>/dev/null || true") == ""
    assert "offline" not in machine.shell("cat /sys/devices/system/memory/memory*/state")
