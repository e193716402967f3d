"""A guest of two NUMA nodes, with memory above 4 GiB, and half of it in ZONE_MOVABLE."""

from __future__ import annotations

import re

import pytest

from contrib.vm import VirtualMachine
from tests.vm.conftest import Stage, nothing_left
from tests.vm.tools import breathe

LARGE_MIB = 5120


@pytest.fixture
def large(stage: Stage) -> VirtualMachine:
    """Two nodes, memory above 4 GiB, and half of it in ZONE_MOVABLE."""
    options = [
        "-object memory-backend-ram,id=m0,size=2560M -object memory-backend-ram,id=m1,size=2560M",
        "-numa node,nodeid=0,memdev=m0,cpus=0 -numa node,nodeid=1,memdev=m1",
        *(f"-trace virtio_balloon_{event}_run" for event in ("handle", "bad", "short")),
    ]
    return stage.machine(
        "large",
        lambda: VirtualMachine(
            LARGE_MIB,
            devices=["virtio-balloon-pci,cont-pages=on,id=balloon1"],
            qemu_options=options,
            append=["movablecore=2560M"],
            cache=True,
        ),
    )


def runs_told(machine: VirtualMachine, direction: str) -> list[tuple[int, int]]:
    """First frame and count of the runs that the device has carried out so far."""
    lines = re.findall(rf"virtio_balloon_handle_run .* {direction} gpa: 0x([0-9a-f]+) size: 0x([0-9a-f]+)", machine.log())
    return [(int(address, 16) // 4096, int(size, 16) // 4096) for address, size in lines]


@pytest.mark.long
def test_nodes_movable_memory_and_memory_above_4_gib(large: VirtualMachine) -> None:
    """Exact targets in whole blocks, in huge pages and in a tail, and no run that crosses a boundary."""
    held = breathe(large, (1500, 4000, 1811))["held_bytes"]
    assert held["blocks"]
    assert held["thp"]
    assert held["pages"]
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
