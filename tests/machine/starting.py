"""As tests/instants.py in a guest, around a model of the device on a bus that is a folder: with real holders, and no blocks.

python -m tests.machine.starting COUNT FOLDER SYSFS
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from balloon_agent.access.names import UIO_DRIVER
from balloon_agent.access.pci import PciFunction, functions
from balloon_agent.agent import run
from balloon_agent.frames import FRAME
from balloon_agent.takeover.device_slot import Seat
from tests.device_model.model import MODERN, BalloonModel
from tests.device_model.numbering import CONT, DEFLATE_ON_OOM
from tests.instants import Surroundings, main
from tests.unit.test_seat import Machine, Transport

TARGET = 40 << 20
# As many frames as any machine has that this runs on: 256 GiB, of which nothing is touched but what is told of.
FRAMES = (256 << 30) // FRAME


class Pages(dict[int, memoryview]):
    frames: frozenset[int] = frozenset()

    def verify(self) -> None:
        """None of them can move."""


class HostedDevice(Transport):
    """Its host asks for the same size all the time."""

    def __init__(self, function: PciFunction, **_: object) -> None:
        BalloonModel.__init__(self, MODERN | CONT | DEFLATE_ON_OOM, frames=FRAMES)
        self.memory = Pages()
        self.num_pages = TARGET // FRAME
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        os.close(self.interrupt_fd)


class NoSettings:
    """This machine's own are left alone."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def follow(self) -> None:
        pass


class ModelledMachine(Surroundings):
    def __init__(self, folder: Path, sysfs: Path) -> None:
        self._folder, self._sysfs = folder, sysfs
        self.options = (
            *("--run-dir", str(folder / "run"), "--sources", "thp,pages", "--no-relief"),
            *("--metrics-listen", "127.0.0.1:0", "--reserve", "16M"),
        )

    def prepare(self) -> None:
        machine = Machine(self._sysfs, self._folder, pytest.MonkeyPatch())
        machine.by_driver = {UIO_DRIVER: HostedDevice}
        patch = pytest.MonkeyPatch()
        patch.setattr(run, "Seat", partial(Seat, present=lambda: functions(self._sysfs), sysfs_root=self._sysfs))
        patch.setattr(run, "Settings", NoSettings)

    def is_holder(self, arguments: list[bytes]) -> bool:
        return super().is_holder(arguments) and any(str(self._folder).encode() in each for each in arguments)

    def held(self) -> dict[str, int]:
        return super().held() | {"blocks": 0}

    def driver(self) -> str | None:
        (found,) = (function for function in functions(self._sysfs) if function.is_balloon)
        return found.driver


if __name__ == "__main__":
    main(int(sys.argv[1]), ModelledMachine(Path(sys.argv[2]), Path(sys.argv[3])))
