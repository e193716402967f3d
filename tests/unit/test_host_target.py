"""The host's target: followed as far as the machine has memory."""

from __future__ import annotations

from typing import cast

import pytest

from balloon_agent.agent.host_target import HostTarget
from balloon_agent.balloon.device import BalloonDevice

GIB = 1 << 30


class FakeDevice:
    """A host that asks for so many bytes."""

    def __init__(self) -> None:
        self.asks = 0

    def target(self) -> int:
        return self.asks


class World:
    """A machine of 4 GiB, of which the host counts 5."""

    def __init__(self) -> None:
        self.memory = 4 * GIB
        self.device = FakeDevice()
        self.target = HostTarget(GIB, lambda: self.memory, lambda: self.memory + GIB)

    def asks(self, size: int) -> None:
        self.device.asks = size
        self.target.read(cast("BalloonDevice", self.device))


def test_a_target_within_the_machine_is_followed() -> None:
    world = World()
    world.asks(4 * GIB)
    assert (world.target.size, world.target.most, world.target.machine) == (4 * GIB, 4 * GIB, 5 * GIB)
    assert not world.target.is_rejected
    assert not world.target.has_become_possible()


def test_a_larger_one_is_rejected_and_logged_once_until_memory_is_plugged_in(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.asks(4 * GIB + 4096)
    world.asks(4 * GIB + 4096)
    world.asks(8 * GIB)
    assert world.target.is_rejected
    # Two different ones.
    assert (world.target.rejected_total, len(caplog.records)) == (2, 1)
    assert "1048577" in caplog.text
    assert not world.target.has_become_possible()
    world.memory = 8 * GIB
    assert world.target.has_become_possible()
    world.asks(8 * GIB)
    assert not world.target.is_rejected


def test_without_a_device_nothing_is_asked() -> None:
    world = World()
    world.asks(9 * GIB)
    world.target.forget()
    assert (world.target.size, world.target.is_rejected) == (0, False)


def test_what_cannot_be_measured_is_believed_to_be_as_before() -> None:
    def fails() -> int:
        raise OSError("too many open files")

    target = HostTarget(GIB, fails)
    device = FakeDevice()
    device.asks = 2 * GIB
    target.read(cast("BalloonDevice", device))
    assert (target.most, target.machine, target.is_rejected) == (GIB, GIB, True)
