"""The QEMU patch, driven by hand: entries that no driver of ours would send, and devices without the feature."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, agent_command
from tests.vm.conftest import address_of_balloon, driver_of_balloon, kernel_driver_works

# Runs in the guest: posts raw bytes to the inflate_cont queue, one buffer each, and says which came back.
RAW_DRIVER = """
import struct, sys
from balloon_agent.access.binding import take
from balloon_agent.access.pci import find_balloon, functions
from balloon_agent.access.uio import UioTransport
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.memory import taking
from balloon_agent.memory.pagemap import Pagemap
from balloon_agent.virtio.queue import Buffer

binding = take(find_balloon(None, functions()))
transport = UioTransport(binding.function)
device = BalloonDevice(transport)
device.start()
page = taking.take_pages(Pagemap(), 1)
frame = page.frames[0].first
address, _ = page.mappings[0]
view = taking.libc.view(address, 4096)
view[:5] = b"there"
entry = lambda frame, size: struct.pack("<II", frame, size)
ram_end, hole = (1 << 30) >> 12, 0xC0000000 >> 12
buffers = {
    "zero": entry(frame, 0),
    "odd": entry(frame, 100),
    "short": entry(frame, 0)[:4],
    "hole": entry(hole, 4096),
    "beyond": entry(0xFFFFFFFF, 0xFFFFF000),
    "rom": entry(0xFFFC0000 >> 12, 0x40000),
    "nothing after": entry(ram_end, 1 << 20),
}
for name, data in buffers.items():
    device._entries.view[: len(data)] = data
    head = device._inflate.add([Buffer(device._entries.address, len(data))])
    device.virtio.notify(device._inflate)
    print(name, "done" if device._inflate.completed() == [head] else "LOST", flush=True)
print("kept" if bytes(view[:5]) == b"there" else "DISCARDED")
# Bad entries around a good one: it is served, they are skipped. And a run that ends beyond the end of RAM is served up to it.
data = entry(frame, 0) + entry(frame, 4096) + entry(frame, 5000) + b"tail"
device._entries.view[: len(data)] = data
head = device._inflate.add([Buffer(device._entries.address, len(data))])
device.virtio.notify(device._inflate)
print("mixed", "done" if device._inflate.completed() == [head] else "LOST")
print("discarded" if bytes(view[:5]) == bytes(5) else "KEPT", flush=True)
device.stop()
view.release()
taking.let_go(page)
transport.close()
binding.restore()
"""


def test_bad_entries_are_skipped_with_a_trace_and_break_nothing(machine: VirtualMachine) -> None:
    python = agent_command()[0].replace("balloon-agent", "python")
    output = machine.run([python, "-c", RAW_DRIVER]).check().out.splitlines()
    names = ("zero", "odd", "short", "hole", "beyond", "rom", "nothing after")
    assert output == [*(f"{name} done" for name in names), "kept", "mixed done", "discarded"]
    traced = machine.log()
    assert traced.count("virtio_balloon_bad_run") >= 8, traced[-3000:]
    assert "4 bytes after the last whole entry" in traced
    kernel_driver_works(machine)


@pytest.fixture
def without_balloon(machine: VirtualMachine) -> Iterator[VirtualMachine]:
    """The balloon unplugged; the device with the feature is back afterwards."""
    unplug(machine)
    yield machine
    if address_of_balloon(machine):
        unplug(machine)
    plug(machine, "on")


def unplug(machine: VirtualMachine) -> None:
    machine.qmp("device_del", id="balloon1")
    deadline = time.monotonic() + 60
    while address_of_balloon(machine) or any(
        "balloon1" in child["name"] for child in machine.qmp("qom-list", path="/machine/peripheral")
    ):
        assert time.monotonic() < deadline, "the balloon does not go"


def plug(machine: VirtualMachine, cont_pages: str) -> None:
    driver, *_ = BALLOON_DEVICE.split(",")
    machine.qmp("device_add", driver=driver, id="balloon1", bus="port1", **{"cont-pages": cont_pages == "on"})
    deadline = time.monotonic() + 60
    while not address_of_balloon(machine):
        assert time.monotonic() < deadline, "the balloon does not come"
    machine.shell("udevadm settle")


def test_a_machine_without_a_balloon_is_told_how_to_get_one(without_balloon: VirtualMachine) -> None:
    result = without_balloon.run(agent_command("run"))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "no virtio balloon on the PCI bus" in result.err


def test_a_balloon_without_cont_pages_is_refused_and_given_back(without_balloon: VirtualMachine) -> None:
    plug(without_balloon, "off")
    result = without_balloon.run(agent_command("run"))
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "does not offer CONT_PAGES (feature bit 6" in errors[0]
    assert driver_of_balloon(without_balloon) == "virtio-pci"
    kernel_driver_works(without_balloon)
