"""What was changed outside this process, written down before it is changed: a small file under /run.

An agent that dies leaves it to the next one, which then knows whose the device was and which blocks are the balloon's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from balloon_agent.errors import BalloonError

_VERSION = 1


class State:
    """The file, and its content. Every change is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.previous_drivers: dict[str, str | None] = {}
        self.blocks: dict[int, str] = {}  # number: zone
        try:
            content = json.loads(path.read_text())
            version = content["version"]
            if version == _VERSION:
                self.previous_drivers = dict(content["previous_drivers"])
                self.blocks = {int(number): str(zone) for number, zone in content["blocks"].items()}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BalloonError(
                f"{path} is damaged ({error!r}): look for offline blocks in /sys/devices/system/memory, then remove it"
            ) from error
        if version != _VERSION:
            raise BalloonError(f"{path} is of version {version}, not {_VERSION}: finish with the agent that wrote it")

    def record_driver(self, address: str, driver: str | None) -> None:
        """The device at ``address`` is about to be taken from ``driver``."""
        self.previous_drivers[address] = driver
        self._write()

    def forget_driver(self, address: str) -> None:
        """The device is back where it was."""
        self.previous_drivers.pop(address, None)
        self._write()

    def record_block(self, number: int, zone: str) -> None:
        """A memory block is about to be taken out of ``zone``."""
        self.blocks[number] = zone
        self._write()

    def forget_block(self, number: int) -> None:
        """The block is back."""
        self.blocks.pop(number, None)
        self._write()

    def _write(self) -> None:
        if not self.previous_drivers and not self.blocks:
            self._path.unlink(missing_ok=True)
            return
        content = {"version": _VERSION, "previous_drivers": self.previous_drivers, "blocks": self.blocks}
        # A rename is whole or not at all, so that a death in the middle leaves the old content.
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(content) + "\n")
        os.replace(part, self._path)
